"""Who is signed in: a token is exchanged for an opaque session id, which a cookie carries."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

from cachetools import TTLCache

SESSION_SECONDS = 7 * 86_400
MOST_SESSIONS = 10_000
"""The oldest are forgotten first."""


class Sessions:
    """Sessions, in memory: after a restart people sign in again. Each keeps the value of an
    Authorization header, which is checked with every request, so a session ends with its token or
    key. Ids are kept as hashes only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._secret = secrets.token_bytes(32)
        self._known: TTLCache[bytes, str] = TTLCache(MOST_SESSIONS, SESSION_SECONDS, clock)

    def open(self, authorization: str) -> str:
        """A new session; returns its id."""
        session = secrets.token_urlsafe(32)
        self._known[_digest(session)] = authorization
        return session

    def authorization(self, session: str) -> str | None:
        """The Authorization header of a session; None if there is no such session."""
        return self._known.get(_digest(session))

    def close(self, session: str) -> None:
        """End a session."""
        self._known.pop(_digest(session), None)

    def form_token(self, session: str) -> str:
        """What forms of this session (empty without authentication) must send back. Pages of other
        origins cannot read it, so they cannot send forms in a person's name."""
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def is_form_token(self, session: str, token: str) -> bool:
        """Whether a form was made for this session."""
        return hmac.compare_digest(self.form_token(session).encode(), token.encode())


def _digest(session: str) -> bytes:
    return hashlib.sha256(session.encode("utf-8", "replace")).digest()
