"""The headers of a request that admission reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from betrace.service.receiver.responses import JSON, PROTOBUF
from betrace.service.tenants import DEFAULT_TENANT

PATHS = frozenset({"/v1/traces", "/api/otlp/traces"})
# Signals other than traces: the reason they are counted as, and the variable that turns them off.
OTHER_SIGNALS = {
    "/v1/logs": ("logs", "OTEL_LOGS_EXPORTER"),
    "/v1/metrics": ("metrics", "OTEL_METRICS_EXPORTER"),
}
ENCODINGS = {"": "", "identity": "", "gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"} | {
    "deflate": "deflate"
}


@dataclass(frozen=True, slots=True)
class Head:
    """The headers of an admitted request. ``length`` is the announced length of the body in bytes,
    None for a chunked body."""

    tenant: str
    content_type: str
    encoding: str
    length: int | None


UNKNOWN_HEAD = Head(DEFAULT_TENANT, JSON, "", None)
"""Of requests without readable headers."""


@lru_cache(maxsize=256)
def content_type(header: bytes) -> str | None:
    """``protobuf`` or ``json``; None for any other media type."""
    media_type = header.partition(b";")[0].strip().lower()
    if media_type in (b"application/x-protobuf", b"application/protobuf"):
        return PROTOBUF
    if media_type == b"application/json":
        return JSON
    return None


@lru_cache(maxsize=256)
def content_encoding(header: bytes) -> str | None:
    """Empty, ``gzip``, ``zstd`` or ``deflate``; None for any other encoding."""
    return ENCODINGS.get(header.decode("latin-1").strip().lower())
