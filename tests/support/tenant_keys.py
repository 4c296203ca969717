"""Keys and tokens for tests: good ones, and forged ones of every kind."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from betrace.service.tenancy.tokens import key_id


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def sign(key: Ed25519PrivateKey, claims: dict[str, Any], **header: Any) -> str:
    """A token of these very claims."""
    return jwt.encode(claims, key, "EdDSA", {"kid": key_id(raw(key)), **header})


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], claims: Any, signature: str = "") -> str:
    return f"{part(header)}.{part(claims)}.{signature}"


def hs256(secret: bytes, kid: str, claims: dict[str, Any]) -> str:
    """A token signed with HMAC, keyed by a public key: what a verifier that lets the token choose
    the algorithm would accept."""
    signed = f"{part({'alg': 'HS256', 'kid': kid})}.{part(claims)}"
    mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
