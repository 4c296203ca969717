"""Cross-origin requests from browsers (CORS, the Fetch standard, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from betrace.service.receiver.heads import PATHS
from betrace.service.receiver.responses import Headers, HttpResponse

ANY: Final = "*"
_PREFLIGHT: Final = [
    (b"access-control-allow-methods", b"POST"),
    (
        b"access-control-allow-headers",
        b"content-type, content-encoding, authorization, x-scope-orgid",
    ),
    (b"access-control-max-age", b"7200"),
    (b"content-length", b"0"),
]


class Cors:
    """What the pages of ``origins`` may do: send spans, and read the answer. ``*`` is every
    origin."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._any = ANY in origins

    def preflight(self, path: str, headers: Headers) -> HttpResponse | None:
        """The answer to OPTIONS; None where it is no preflight of a request for spans. An origin
        that is not allowed gets 403."""
        fields = dict(headers)
        origin = fields.get(b"origin")
        asked = b"access-control-request-method" in fields
        if origin is None or not asked or path not in PATHS:
            return None
        if not self._allows(origin):
            shown = origin.decode("latin-1")[:200]
            message = f"pages of {shown} may not send here; add it to ingest.cors_origins"
            return HttpResponse(403, [(b"content-length", b"0")], b"", message, "origin")
        more = []
        if fields.get(b"access-control-request-private-network") == b"true":
            more.append((b"access-control-allow-private-network", b"true"))
        return HttpResponse(204, [*_PREFLIGHT, *self._allowed(origin), *more], b"")

    def expose(self, headers: Headers, response: HttpResponse) -> HttpResponse:
        """``response`` as the page that sent ``headers`` may read it."""
        for name, value in headers:
            if name == b"origin" and self._allows(value):
                readable = (b"access-control-expose-headers", b"retry-after")
                fields = [*response.headers, *self._allowed(value), readable]
                message, reason = response.message, response.reason
                return HttpResponse(response.status, fields, response.body, message, reason)
        return response

    def _allows(self, origin: bytes) -> bool:
        return self._any or origin in self._origins

    def _allowed(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        # With credentials, since navigator.sendBeacon always asks for them; none are used here.
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-credentials", b"true"),
            (b"vary", b"origin"),
        ]
