"""Responses of the OTLP port. Errors are a ``google.rpc.Status``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from betrace.service.otlp.response import status_body

Headers = Iterable[tuple[bytes, bytes]]

# The google.rpc.Code for an HTTP status, as in googleapis' code.proto where it maps them.
RPC_CODES = {
    400: 3,  # INVALID_ARGUMENT
    401: 16,  # UNAUTHENTICATED
    403: 7,  # PERMISSION_DENIED
    404: 5,  # NOT_FOUND
    405: 12,  # UNIMPLEMENTED
    408: 4,  # DEADLINE_EXCEEDED
    413: 3,
    415: 3,
    429: 8,  # RESOURCE_EXHAUSTED
    431: 3,
    503: 14,  # UNAVAILABLE
    505: 12,
}

PROTOBUF = "protobuf"
JSON = "json"
MEDIA_TYPES = {PROTOBUF: b"application/x-protobuf", JSON: b"application/json"}


@dataclass(frozen=True, slots=True, eq=False)
class HttpResponse:
    """A complete response. ``headers`` include content-type and content-length. A refusal of the
    ingestion listeners also has its ``message`` and ``reason`` outside the body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    message: str = ""
    reason: str = ""


def respond(
    status: int, body: bytes, media_type: bytes, *extra: tuple[bytes, bytes]
) -> HttpResponse:
    """A response with ``body`` of ``media_type`` and ``extra`` headers."""
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body)), *extra]
    return HttpResponse(status, headers, body)


def export_error(
    status: int, content_type: str, message: str, *extra: tuple[bytes, bytes], reason: str = ""
) -> HttpResponse:
    """An error for an exporter: a ``google.rpc.Status`` as ``content_type`` (protobuf | json)."""
    body = status_body(content_type == JSON, RPC_CODES[status], message)
    response = respond(status, body, MEDIA_TYPES[content_type], *extra)
    return HttpResponse(status, response.headers, body, message, reason)
