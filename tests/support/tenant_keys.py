"""Keys, tokens and an authenticator for tests: valid tokens, and forged ones of every kind."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from betrace.channels import ThreadRunner
from betrace.service.config.edge import Auth
from betrace.service.tenancy.authentication import Authenticator, OperatorTokens
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.tenant import PublicKey
from betrace.service.tenancy.tokens import key_id, make_token

OPERATOR = "operator-token-of-the-tests"
READER = "read-only-token-of-the-tests"
SCRAPER = "scrape-token-of-the-tests"
UNREADABLE = "unreadable"
"""A tenant whose keys cannot be read."""


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def sign(key: Ed25519PrivateKey, claims: dict[str, Any], **header: Any) -> str:
    """A token with exactly these claims."""
    return jwt.encode(claims, key, "EdDSA", {"kid": key_id(raw(key)), **header})


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], claims: Any, signature: str = "") -> str:
    return f"{part(header)}.{part(claims)}.{signature}"


def hs256(secret: bytes, kid: str, claims: dict[str, Any]) -> str:
    """A token signed with HMAC under a public key, which a verifier would accept if it let the
    token choose the algorithm."""
    signed = f"{part({'alg': 'HS256', 'kid': kid})}.{part(claims)}"
    mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def bearer(key: Ed25519PrivateKey, tenant: str, lifetime_seconds: float = 60) -> str:
    """An Authorization header with a valid token."""
    return "Bearer " + make_token(key, tenant, time.time(), lifetime_seconds)


@contextmanager
def authenticating(keys: Mapping[str, Ed25519PrivateKey]) -> Iterator[Authenticator]:
    """An authenticator that knows one key per tenant, and the tokens ``OPERATOR`` and
    ``SCRAPER``."""
    known = {
        (tenant, kid): PublicKey(kid, raw(key), 0, None)
        for tenant, key in keys.items()
        for kid in [key_id(raw(key))]
    }

    async def load(key: tuple[str, str]) -> PublicKey | None:
        if key[0] == UNREADABLE:
            raise DirectoryError("the disk failed")
        return known.get(key)

    async def exists(tenant: str) -> bool:
        return tenant in keys

    settings = Auth(enabled=True, operator_token=OPERATOR, scrape_token=SCRAPER)
    threads = ThreadRunner("signatures", 1)
    try:
        yield Authenticator(settings, OperatorTokens(OPERATOR), load, exists, threads)
    finally:
        threads.close()
