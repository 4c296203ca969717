import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.tenancy.tokens import (
    BadKeyError,
    BadTokenError,
    claimed,
    is_key_id,
    key_id,
    make_token,
    public_pem,
    read_private_key,
    read_public_key,
    verify,
    write_private_key,
)
from tests.support.tenant_keys import hs256, new_key, part, raw, sign, unsigned

KEY = new_key()
NOW = time.time()
SOON = int(NOW + 86_400)  # the tests may run long after they were collected


def test_the_name_of_a_key_is_its_thumbprint():
    x = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert key_id(x) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"  # RFC 8037, A.3
    assert is_key_id(key_id(x))
    assert not is_key_id(key_id(x) + "\n")


def test_a_token_proves_its_tenant():
    now = time.time()
    token = make_token(KEY, "acme", now, 60)
    assert claimed(token) == ("acme", key_id(raw(KEY)))
    expires, read_only = verify(token, "acme", raw(KEY), 0)
    assert expires == pytest.approx(now + 60, abs=1)
    assert not read_only


def test_a_read_only_token_says_so():
    token = make_token(KEY, "acme", time.time(), 60, read_only=True)
    assert verify(token, "acme", raw(KEY), 0)[1]


def test_an_unknown_kind_of_access_is_refused():
    token = sign(KEY, GOOD | {"access": "most"})
    with pytest.raises(BadTokenError, match="claim `access` is not `read`"):
        verify(token, "acme", raw(KEY), 0)


def test_a_private_key_is_written_for_its_owner_alone(tmp_path):
    path = tmp_path / "acme.pem"
    write_private_key(path, KEY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert raw(read_private_key(path)) == raw(KEY)
    with pytest.raises(FileExistsError):
        write_private_key(path, KEY)
    path.write_text("nothing")
    with pytest.raises(BadKeyError, match="not an Ed25519 private key"):
        read_private_key(path)


def test_only_ed25519_public_keys_are_accepted():
    assert read_public_key(public_pem(KEY)) == raw(KEY)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = other.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()
    with pytest.raises(BadKeyError, match="not an Ed25519 key"):
        read_public_key(pem)
    for text in ("", "x", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "\0"):
        with pytest.raises(BadKeyError, match="not a PEM public key"):
            read_public_key(text)


KID = key_id(raw(KEY))
GOOD = {"tenant": "acme", "exp": SOON}
HEAD = {"alg": "EdDSA", "kid": KID}


def _numbered(value: str) -> str:
    """The id of a parameter: of a token, where it starts to differ from run to run, its length."""
    return f"{len(value)} characters" if value.count(".") == 2 else value[:40]


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (unsigned({"alg": "none", "kid": KID}, GOOD), "not signed with EdDSA"),
        (unsigned({"alg": "None", "kid": KID}, GOOD), "not signed with EdDSA"),
        (hs256(raw(KEY), KID, GOOD), "not signed with EdDSA"),
        (hs256(public_pem(KEY).encode(), KID, GOOD), "not signed with EdDSA"),
        (unsigned({"alg": ["EdDSA"], "kid": KID}, GOOD), "token"),
        (unsigned({"alg": "EdDSA"}, GOOD, "AA"), "kid is not a key id"),
        (unsigned({"alg": "EdDSA", "kid": "../../etc/passwd"}, GOOD, "AA"), "kid is not a key id"),
        (unsigned({"alg": "EdDSA", "kid": "' OR 1=1 --"}, GOOD, "AA"), "kid is not a key id"),
        (unsigned({"alg": "EdDSA", "kid": 7}, GOOD, "AA"), "token"),
        (unsigned(HEAD, {"exp": SOON}, "AA"), "is not a tenant name"),
        (unsigned(HEAD, GOOD | {"tenant": "../acme"}, "AA"), "is not a tenant name"),
        (unsigned(HEAD, GOOD | {"tenant": ["acme"]}, "AA"), "is not a tenant name"),
        (unsigned(HEAD, GOOD | {"tenant": "acme\n"}, "AA"), "is not a tenant name"),
        (unsigned(HEAD, [GOOD], "AA"), "not a JSON Web Token"),
        (unsigned(HEAD, GOOD, "!"), "not a JSON Web Token"),
        ("a.b.c", "not a JSON Web Token"),
        ("", "not a JSON Web Token"),
        ("." * 4000, "not a JSON Web Token"),
        (part(HEAD) + "." + "W" * 3000 + ".AA", "not a JSON Web Token"),
        ("x" * 4097, "longer than 4096"),
    ],
    ids=_numbered,  # tokens differ from run to run
)
def test_an_invalid_token_claims_nothing(token, says):
    with pytest.raises(BadTokenError, match=says):
        claimed(token)


NOT_SIGNED = "not signed with a valid key"


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (sign(KEY, GOOD | {"exp": int(NOW) - 100}), "has expired"),
        (sign(KEY, GOOD | {"nbf": SOON}), "not valid yet"),
        (sign(KEY, GOOD | {"iat": SOON}), "not valid yet"),
        (sign(KEY, {"tenant": "acme"}), "never expires"),
        (sign(KEY, GOOD | {"tenant": "other"}), NOT_SIGNED),
        (sign(KEY, GOOD | {"exp": "soon"}), NOT_SIGNED),
        (sign(KEY, GOOD | {"exp": float("inf")}), NOT_SIGNED),
        (sign(KEY, GOOD | {"exp": None}), "token"),
        (sign(new_key(), GOOD, kid=KID), NOT_SIGNED),
        (unsigned(HEAD, GOOD, ""), NOT_SIGNED),
        (unsigned(HEAD, GOOD, "A" * 86), NOT_SIGNED),
        (unsigned({"alg": "none"}, GOOD), NOT_SIGNED),
        (hs256(raw(KEY), KID, GOOD), NOT_SIGNED),
        (hs256(public_pem(KEY).encode(), KID, GOOD), NOT_SIGNED),
        (sign(KEY, GOOD, crit=["exp"]), NOT_SIGNED),
        (sign(KEY, GOOD, crit=["b64"], b64=False), NOT_SIGNED),
    ],
    ids=_numbered,  # tokens differ from run to run
)
def test_a_token_not_signed_or_not_valid_now_is_refused(token, says):
    with pytest.raises(BadTokenError, match=says):
        verify(token, "acme", raw(KEY), 30)


def test_clocks_may_differ_a_little():
    now = int(time.time())
    late = sign(KEY, GOOD | {"exp": now - 10})
    early = sign(KEY, GOOD | {"nbf": now + 10})
    for token in (late, early):
        verify(token, "acme", raw(KEY), 30)
        with pytest.raises(BadTokenError):
            verify(token, "acme", raw(KEY), 0)


@given(st.data())
def test_a_changed_token_is_refused(data):
    token = make_token(KEY, "acme", NOW, 86_400)
    at = data.draw(st.integers(0, len(token) - 1))
    with_ = data.draw(st.sampled_from("ABCDwxyz0189-_.=+/ \n"))
    changed = token[:at] + with_ + token[at + 1 :]
    try:
        tenant, kid = claimed(changed)
        verify(changed, tenant, raw(KEY), 0)
    except BadTokenError:
        return
    # The last character of base64 has bits that stand for nothing.
    assert (tenant, kid) == claimed(token)
    assert changed == token or at == len(token) - 1


@given(st.text(max_size=200))
def test_any_text_is_refused_with_a_sentence(text):
    with pytest.raises(BadTokenError):
        claimed(text)
