import time

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.config.edge import Auth
from betrace.service.tenancy import authentication
from betrace.service.tenancy.authentication import (
    READ_ONLY,
    Authenticator,
    Denied,
    OperatorTokens,
    SecretError,
    operator_tokens,
)
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.tenant import PublicKey
from betrace.service.tenancy.tokens import key_id, make_token
from tests.support.tenant_keys import OPERATOR, READER, SCRAPER, new_key, raw, sign

KEY = new_key()
KID = key_id(raw(KEY))


class World:
    """A directory of one tenant, a clock, and an authenticator before them."""

    def __init__(self, **settings):
        self.now = time.time()
        self.keys = {("acme", KID): PublicKey(KID, raw(KEY), 0, None)}
        self.asked = []
        self.error = None
        self.threads = ThreadRunner("signatures", 1)
        given = {"enabled": True, "operator_token": OPERATOR, "scrape_token": SCRAPER} | settings
        self.gate = Authenticator(
            Auth(**given),
            OperatorTokens(OPERATOR, READER),
            self.load,
            self.exists,
            self.threads,
            lambda: self.now,
        )

    async def load(self, key):
        self.asked.append(key)
        if self.error:
            raise self.error
        await trio.lowlevel.checkpoint()
        return self.keys.get(key)

    async def exists(self, tenant):
        if self.error:
            raise self.error
        return tenant == "acme"

    def bearer(self, lifetime=60):
        return "Bearer " + make_token(KEY, "acme", self.now, lifetime)


@pytest.fixture
def world():
    made = World()
    yield made
    made.threads.close()


async def test_a_token_is_verified_once_and_remembered(world):
    header = world.bearer()
    assert world.gate.remembered(header) is None
    assert await world.gate.tenant(header) == "acme"
    assert await world.gate.tenant(header) == "acme"
    assert world.gate.remembered(header) == "acme"
    assert world.asked == [("acme", KID)]


async def test_it_is_remembered_until_it_expires(world):
    header = world.bearer(60)
    await world.gate.tenant(header)
    world.now += 89  # and the clocks may differ by 30 s
    assert world.gate.remembered(header) == "acme"
    world.now += 3
    assert world.gate.remembered(header) is None


async def test_it_is_remembered_until_the_grace_of_its_key_is_over(world):
    world.keys["acme", KID] = PublicKey(KID, raw(KEY), 0, int((world.now + 20) * 1e9))
    header = world.bearer()
    assert await world.gate.tenant(header) == "acme"
    world.now += 21
    assert world.gate.remembered(header) is None
    assert isinstance(await world.gate.tenant(header), Denied)


async def test_a_revoked_key_is_invalid(world):
    header = world.bearer()
    await world.gate.tenant(header)
    del world.keys["acme", KID]
    world.gate.forget("other")
    assert world.gate.remembered(header) == "acme"
    world.gate.forget("acme")
    denied = await world.gate.tenant(header)
    assert (denied.status, "not signed with a valid key" in denied.message) == (401, True)


async def test_a_key_revoked_while_a_token_is_verified_is_not_remembered(world, monkeypatch):
    header = world.bearer()

    def slow(*args):
        world.gate._revision += 1  # as forget() does, on another thread
        return time.time() + 60, False

    monkeypatch.setattr(authentication, "verify", slow)
    assert await world.gate.tenant(header) == "acme"
    assert world.gate.remembered(header) is None


async def test_tokens_that_are_remembered_are_bounded():
    world = World(remembered_tokens=3)
    headers = [world.bearer(60 + i) for i in range(10)]
    for header in headers:
        assert await world.gate.tenant(header) == "acme"
    assert len(world.gate) == 3
    world.threads.close()


async def test_an_unknown_tenant_key_and_signature_have_the_same_message(world):
    stranger = new_key()
    forged = sign(stranger, {"tenant": "acme", "exp": int(world.now) + 60}, kid=KID)
    nobody = make_token(stranger, "nobody", world.now, 60)
    unknown_key = make_token(stranger, "acme", world.now, 60)
    answers = [await world.gate.tenant(f"Bearer {t}") for t in (forged, nobody, unknown_key)]
    assert len({(denied.status, denied.message) for denied in answers}) == 1


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YWNtZTphY21l",
        "Bearer a.b.c",
        "Bearer \udce4",
        "\u20ac",
    ],
)
async def test_an_invalid_token_is_a_401(world, header):
    assert (await world.gate.tenant(header)).status == 401


async def test_a_directory_that_cannot_be_read_is_a_503(world):
    world.error = DirectoryError("the disk is gone")
    assert (await world.gate.tenant(world.bearer())).status == 503
    assert (await world.gate.caller(f"Bearer {OPERATOR}", "acme")).status == 503


async def test_operators_and_scrapers(world):
    gate = world.gate
    assert await gate.operator(f"Bearer {OPERATOR}") is None
    assert await gate.operator(f"bearer  {OPERATOR} ") is None
    assert await gate.scraper(f"Bearer {OPERATOR}") is None
    assert await gate.scraper(f"Bearer {SCRAPER}") is None
    for token in (SCRAPER, OPERATOR[:-1], OPERATOR + "x", world.bearer()[7:], "\udce4"):
        assert (await gate.operator(f"Bearer {token}")).status == 403
    assert (await gate.operator(None)).status == 401
    assert (await gate.scraper(world.bearer())).status == 403


async def test_an_operator_may_act_for_a_tenant_and_a_tenant_for_no_other(world):
    gate = world.gate
    assert await gate.caller(f"Bearer {OPERATOR}", "acme") == "acme"
    assert (await gate.caller(f"Bearer {OPERATOR}", "nobody")).status == 403
    assert (await gate.caller(f"Bearer {OPERATOR}", "../acme")).status == 403
    assert (await gate.caller(f"Bearer {OPERATOR}", None)).status == 401
    assert await gate.caller(world.bearer(), "other") == "acme"
    assert (await gate.tenant(f"Bearer {OPERATOR}")).status == 401  # none sends spans with it


async def test_secrets_are_compared_in_constant_time(world, monkeypatch):
    compared = []

    def compare(one, two):
        compared.append((one, two))
        return one == two

    monkeypatch.setattr(authentication.hmac, "compare_digest", compare)
    await world.gate.operator("Bearer x")
    await world.gate.scraper(f"Bearer {OPERATOR}")
    # All secrets, though the first one matched: operator and reader, then the scraper's too.
    assert len(compared) == 2 + 3
    assert {len(side) for pair in compared for side in pair} == {32}  # of whatever was sent


def test_sources_of_the_operator_token(tmp_path):
    path = tmp_path / "token"
    path.write_text(OPERATOR + "\n")
    assert operator_tokens(Auth(enabled=True, operator_token_file=str(path))).operator == OPERATOR
    assert operator_tokens(Auth(enabled=True, operator_token=OPERATOR)) == OperatorTokens(OPERATOR)
    path.write_text("short")
    with pytest.raises(SecretError, match="fewer than 20"):
        operator_tokens(Auth(enabled=True, operator_token_file=str(path)))
    with pytest.raises(SecretError, match="cannot be read"):
        operator_tokens(Auth(enabled=True, operator_token_file=str(tmp_path / "none")))
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(SecretError, match="not text"):
        operator_tokens(Auth(enabled=True, operator_token_file=str(path)))


def test_sources_of_the_read_only_token(tmp_path):
    path = tmp_path / "token"
    path.write_text(READER + "\n")
    given = {"enabled": True, "operator_token": OPERATOR}
    expected = OperatorTokens(OPERATOR, READER)
    assert operator_tokens(Auth(**given, read_only_token_file=str(path))) == expected
    assert operator_tokens(Auth(**given, read_only_token=READER)) == expected
    with pytest.raises(SecretError, match="would not be read-only"):
        operator_tokens(Auth(**given, read_only_token=OPERATOR))
    with pytest.raises(SecretError, match="read-only token in auth"):
        operator_tokens(Auth(**given, read_only_token="short"))


async def test_read_only_tokens_can_read_and_nothing_else():
    world = World()
    token = f"Bearer {make_token(KEY, 'acme', world.now, 600, read_only=True)}"
    for _ in range(2):  # when it is verified, and when it is remembered
        assert await world.gate.tenant(token, reads=True) == "acme"
        assert await world.gate.tenant(token) == Denied(403, READ_ONLY)
        assert world.gate.remembered(token) is None
    assert await world.gate.caller(token, None, reads=True) == "acme"
    reader = f"Bearer {READER}"
    assert await world.gate.operator(reader, reads=True) is None
    assert await world.gate.operator(reader) == Denied(403, READ_ONLY)
    assert await world.gate.scraper(reader) is None
    assert await world.gate.caller(reader, "acme", reads=True) == "acme"
    assert await world.gate.caller(reader, "acme") == Denied(403, READ_ONLY)


def test_secrets_are_not_shown():
    auth = Auth(enabled=True, operator_token=OPERATOR, scrape_token=SCRAPER, read_only_token=READER)
    shown = f"{auth!r} {auth} {auth.model_dump()} {auth.model_dump_json()}"
    assert OPERATOR not in shown
    assert SCRAPER not in shown
    assert READER not in shown
