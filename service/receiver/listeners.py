"""The listeners for spans: OTLP over HTTP and over gRPC."""

from __future__ import annotations

from functools import partial
from typing import Any

import trio

from betrace.service.config.base import OFF
from betrace.service.config.settings import Settings
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.grpc_server import serve_grpc
from betrace.service.receiver.server import serve_ingest


async def listen_for_spans(
    nursery: trio.Nursery, admission: Admission, settings: Settings, stop: trio.Event
) -> tuple[str | None, str | None]:
    """Start both listeners, which serve until ``stop``; returns the URLs of HTTP and gRPC, None for
    a listener that is off."""
    ingest = settings.ingest
    options: dict[str, Any] = {
        "tls": settings.tls,
        "grace_seconds": settings.shutdown.grace_seconds,
    }
    if ingest.address == OFF:
        return None, None
    http: str = await nursery.start(
        partial(serve_ingest, **options), admission, ingest, ingest.address, stop
    )
    if ingest.grpc_address == OFF:
        return http, None
    grpc: str = await nursery.start(partial(serve_grpc, **options), admission, ingest, stop)
    return http, grpc
