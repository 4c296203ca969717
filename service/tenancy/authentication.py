"""Who a caller is: tenants prove it with tokens signed by their keys, operators with a secret.

A token is verified once, in a worker thread, and remembered by its hash until it expires or its key
is revoked. After that a request costs one hash and one look-up. Without authentication, callers
name their tenant themselves (:func:`claimed_tenant`).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from cachetools import TLRUCache
from pydantic import SecretStr

from betrace.channels import ThreadRunner
from betrace.service.config.edge import Auth
from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.tenant import PublicKey
from betrace.service.tenancy.tokens import NOT_SIGNED, BadTokenError, claimed, verify
from betrace.service.tenants import DEFAULT_TENANT, TENANT_RULE, is_tenant_name

LEAST_SECRET_CHARACTERS = 20

VerifiedToken = tuple[str, str, float, bool]
"""The tenant, the key's id, when the token expires (seconds since 1970), and whether it is
read-only."""

READ_ONLY = "this token is read-only, so it can send and change nothing; use another token"

LoadKey = Callable[[tuple[str, str]], Awaitable[PublicKey | None]]
"""Returns the key for (tenant, kid), None if the tenant has no such key."""


class SecretError(Exception):
    """An operator's token cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class OperatorTokens:
    """The operator token, and the one for those who only look, None without one."""

    operator: str
    read_only: str | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a caller is refused: the HTTP status (400, 401, 403 or 503), and what to do."""

    status: int
    message: str


def claimed_tenant(header: str | None) -> str | Denied:
    """The tenant named by the header X-Scope-OrgID, for use without authentication."""
    if header is None:
        return DEFAULT_TENANT
    if is_tenant_name(header):
        return header
    return Denied(400, f"X-Scope-OrgID {header[:80]!r} is not a tenant name: {TENANT_RULE}")


def closed_tenant(tenant: str) -> Denied:
    """The refusal for a tenant that was deleted."""
    return Denied(
        403,
        f"the tenant {tenant} was deleted; an operator can create it again with `betrace tenants`",
    )


class Authenticator:
    """Checks Authorization headers. Call the methods on the Trio thread.

    ``tenant_exists`` says whether an operator may act for a tenant; ``clock`` is the wall clock in
    seconds. Read-only tokens are accepted only by calls with ``reads=True``, which is for requests
    that change nothing.
    """

    def __init__(
        self,
        settings: Auth,
        tokens: OperatorTokens,
        load_key: LoadKey,
        tenant_exists: Callable[[str], Awaitable[bool]],
        threads: ThreadRunner,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._skew = settings.clock_skew_seconds
        self._operator = _digest(tokens.operator)
        self._reader = () if tokens.read_only is None else (_digest(tokens.read_only),)
        scrape = settings.scrape_token.get_secret_value()
        self._scrape = (_digest(scrape),) if scrape else ()
        self._load_key = load_key
        self._tenant_exists = tenant_exists
        self._threads = threads
        self._clock = clock
        self._known: TLRUCache[bytes, VerifiedToken] = TLRUCache(
            settings.remembered_tokens, lambda _, known, now: known[2], clock
        )
        self._revision = 0  # grows when keys change

    def remembered(self, authorization: str) -> str | None:
        """The tenant of a token that was verified before, None for other tokens and read-only
        ones. Never waits."""
        known = self._find(authorization)
        return None if known is None or known[3] else known[0]

    def _find(self, authorization: str) -> VerifiedToken | None:
        return self._known.get(hashlib.sha256(authorization.encode("latin-1")).digest())

    async def tenant(self, authorization: str | None, *, reads: bool = False) -> str | Denied:
        """The tenant that the header proves."""
        if authorization is None:
            return Denied(
                401, "no token was sent; add the header printed by `betrace tenants token`"
            )
        try:
            found = self._find(authorization)
        except UnicodeEncodeError:
            return _denied("the Authorization header is not valid text")
        if found is not None:
            return _allowed(found[0], found[3], reads)
        token = bearer(authorization)
        if token is None:
            return _denied("the Authorization header is not `Bearer` followed by a token")
        try:
            tenant, kid = claimed(token)
            revision = self._revision
            key = await self._load_key((tenant, kid))
            if key is None or (
                key.expires_ns is not None and key.expires_ns <= self._clock() * 1e9
            ):
                raise BadTokenError(NOT_SIGNED)
            expires, read_only = await self._threads.run(
                verify, token, tenant, key.public, self._skew
            )
        except BadTokenError as error:
            return _denied(str(error))
        except DirectoryError:
            return Denied(503, "tokens cannot be verified right now; try again later")
        until = expires + self._skew
        if key.expires_ns is not None:
            until = min(until, key.expires_ns / 1e9)
        if revision == self._revision:  # otherwise the key may have been revoked
            digest = hashlib.sha256(authorization.encode("latin-1")).digest()
            self._known[digest] = (tenant, kid, until, read_only)
        return _allowed(tenant, read_only, reads)

    async def caller(
        self, authorization: str | None, scope: str | None, *, reads: bool = False
    ) -> str | Denied:
        """The tenant that the header proves; for an operator, the tenant named by ``scope`` (the
        header X-Scope-OrgID)."""
        if scope is None or await self.operator(authorization, reads=True) is not None:
            return await self.tenant(authorization, reads=reads)
        refused = await self.operator(authorization, reads=reads)
        if refused is not None:
            return refused
        try:
            if is_tenant_name(scope) and await self._tenant_exists(scope):
                return scope
        except DirectoryError:
            return Denied(503, "the tenant directory cannot be read right now; try again later")
        return Denied(403, f"there is no tenant {scope[:80]!r}; see `betrace tenants list`")

    async def operator(self, authorization: str | None, *, reads: bool = False) -> Denied | None:
        """None if the header proves an operator."""
        refused = self._secret(authorization, (self._operator, *self._reader), "operator")
        if refused is None and not reads:
            wrong = self._secret(authorization, (self._operator,), "operator")
            return None if wrong is None else Denied(403, READ_ONLY)
        return refused

    async def scraper(self, authorization: str | None) -> Denied | None:
        """None if the header proves someone who may read metrics."""
        secrets = (self._operator, *self._reader, *self._scrape)
        return self._secret(authorization, secrets, "scrape or the operator")

    def _secret(
        self, authorization: str | None, secrets: tuple[bytes, ...], name: str
    ) -> Denied | None:
        token = None if authorization is None else bearer(authorization)
        if token is None:
            return Denied(
                401, f"this request needs the {name} token: send `Authorization: Bearer TOKEN`"
            )
        digest = _digest(token)
        # Compare with all of them, so that the time reveals nothing.
        matches = [hmac.compare_digest(digest, secret) for secret in secrets]
        if any(matches):
            return None
        return Denied(403, f"the token is not the {name} token")

    def forget(self, tenant: str) -> None:
        """Verify the tenant's tokens again, because its keys changed."""
        self._revision += 1
        for digest, known in list(self._known.items()):
            if known[0] == tenant:
                self._known.pop(digest, None)

    def __len__(self) -> int:
        return len(self._known)


def _allowed(tenant: str, read_only: bool, reads: bool) -> str | Denied:
    return Denied(403, READ_ONLY) if read_only and not reads else tenant


def bearer(authorization: str) -> str | None:
    """The token in the value of an Authorization header (RFC 6750, 2.1), None without one."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token else None


def operator_tokens(settings: Auth) -> OperatorTokens:
    """The operators' tokens of the settings. Raises :exc:`SecretError`."""
    operator = _read_secret("operator", settings.operator_token, settings.operator_token_file)
    if not (settings.read_only_token.get_secret_value() or settings.read_only_token_file):
        return OperatorTokens(operator)
    read_only = _read_secret("read_only", settings.read_only_token, settings.read_only_token_file)
    if read_only == operator:
        raise SecretError(
            "the read-only token is the operator token, so it would not be read-only; make another "
            "with `openssl rand -hex 32`"
        )
    return OperatorTokens(operator, read_only)


def _read_secret(name: str, given: SecretStr, file: str) -> str:
    """The secret ``name`` from its setting or its file."""
    token = given.get_secret_value()
    shown = name.replace("_", "-")
    origin = f"auth.{name}_token"
    if not token:
        path = Path(file)
        origin = f"the file {path} (auth.{name}_token_file)"
        try:
            token = path.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SecretError(
                f"the {shown} token cannot be read from {origin} ({reason}); "
                "name a file that contains only the token, such as the output of "
                "`openssl rand -hex 32`"
            ) from error
    if len(token) < LEAST_SECRET_CHARACTERS:
        raise SecretError(
            f"the {shown} token in {origin} has fewer than {LEAST_SECRET_CHARACTERS} characters; "
            "use a random one, such as the output of `openssl rand -hex 32`"
        )
    return token


def _denied(message: str) -> Denied:
    return Denied(401, f"{message}; get a new one with `betrace tenants token`")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
