"""Ed25519 keys and the tokens they sign: JSON Web Tokens (RFC 7519) with EdDSA (RFC 8037).

The service only ever sees public keys: a private key stays where it was made, and signs there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from betrace.service.tenants import is_tenant_name

ALGORITHM = "EdDSA"
MAX_TOKEN_CHARACTERS = 4096
KEY_BYTES = 32
READ = "read"
"""The claim ``access`` of a read-only token; other tokens have no such claim."""

_KEY_ID = re.compile(r"[A-Za-z0-9_-]{43}")


class BadKeyError(Exception):
    """A key cannot be used; the message says why and what to do."""


class BadTokenError(Exception):
    """A token is invalid; the message says why."""


# Keys


def key_id(public: bytes) -> str:
    """The id of a public key (its 32 bytes): the JWK thumbprint (RFC 7638; for Ed25519 RFC 8037,
    appendix A.3)."""
    x = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
    jwk = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": x}, separators=(",", ":"))
    digest = hashlib.sha256(jwk.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def is_key_id(text: str) -> bool:
    """Whether ``text`` has the form of a :func:`key_id`."""
    return _KEY_ID.fullmatch(text) is not None


def read_public_key(pem: str) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM. Raises :exc:`BadKeyError`."""
    remedy = "send the output of `openssl pkey -in private.pem -pubout` for an Ed25519 key"
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadKeyError(f"the public key is not a PEM public key; {remedy}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadKeyError(f"the public key is not an Ed25519 key; {remedy}")
    return key.public_bytes_raw()


def public_pem(key: Ed25519PrivateKey) -> str:
    """The public key as PEM."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def write_private_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a private key to a new file that only its owner may read. Raises
    :exc:`FileExistsError`."""
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key in a PEM file. Raises :exc:`BadKeyError` and :exc:`OSError`."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKeyError(
            f"{path} is not an Ed25519 private key in PEM without a password; name the file "
            "written by `betrace tenants create`"
        )
    return key


# Tokens


def make_token(
    key: Ed25519PrivateKey,
    tenant: str,
    now: float,
    lifetime_seconds: float,
    *,
    read_only: bool = False,
) -> str:
    """A token that proves ``tenant``, valid from ``now`` (seconds since 1970). With a ``read_only``
    one, nothing can be sent or changed."""
    claims = {"tenant": tenant, "iat": int(now), "exp": int(now + lifetime_seconds)}
    claims |= {"access": READ} if read_only else {}
    kid = key_id(key.public_key().public_bytes_raw())
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": kid})


def claimed(token: str) -> tuple[str, str]:
    """The tenant and the key id that a token claims, not yet verified. Raises
    :exc:`BadTokenError`."""
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise BadTokenError(f"the token is longer than {MAX_TOKEN_CHARACTERS} characters")
    try:
        found = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise BadTokenError("the token is not a JSON Web Token") from None
    header, tenant = found["header"], found["payload"].get("tenant")
    if header.get("alg") != ALGORITHM:
        raise BadTokenError(f"the token is not signed with {ALGORITHM}")
    kid = header.get("kid")
    if not isinstance(kid, str) or not is_key_id(kid):
        raise BadTokenError("the token's kid is not a key id")
    if not isinstance(tenant, str) or not is_tenant_name(tenant):
        raise BadTokenError("the token's claim `tenant` is not a tenant name")
    return tenant, kid


def verify(token: str, tenant: str, public: bytes, clock_skew_seconds: float) -> tuple[float, bool]:
    """Verify a token against the public key that it names. Returns when it expires (seconds since
    1970), and whether it is read-only.

    Raises :exc:`BadTokenError` if it is not signed with that key, not for ``tenant``, expired, or
    not valid yet, give or take ``clock_skew_seconds``.
    """
    try:
        claims = jwt.decode(
            token,
            Ed25519PublicKey.from_public_bytes(public),
            algorithms=[ALGORITHM],
            leeway=clock_skew_seconds,
            options={"require": ["exp"], "verify_aud": False},
        )
        expires = float(claims["exp"])
    except jwt.ExpiredSignatureError:
        raise BadTokenError("the token has expired") from None
    except jwt.ImmatureSignatureError:
        raise BadTokenError("the token is not valid yet; check the clocks") from None
    except jwt.MissingRequiredClaimError:
        raise BadTokenError("the token never expires, because it has no claim `exp`") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise BadTokenError(NOT_SIGNED) from None
    if claims.get("tenant") != tenant:
        raise BadTokenError(NOT_SIGNED)
    access = claims.get("access")
    if access not in (None, READ):
        raise BadTokenError(f"the token's claim `access` is not `{READ}`")
    return expires, access == READ


NOT_SIGNED = "the token is not signed with a valid key of its tenant"
"""The same message for a wrong tenant, key or signature, so that none of them can be probed."""
