"""The gRPC listener: the connections of :mod:`betrace.service.receiver.grpc.connection`, accepted,
timed and retired as those of HTTP are."""

from __future__ import annotations

from functools import partial
from typing import Final

import trio

from betrace.service.config.edge import Ingest, Tls
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.grpc.connection import GrpcConnection
from betrace.service.receiver.server import Protocol, serve_ingest
from betrace.service.receiver.sockets import ListenError

GRPC: Final = Protocol("h2", GrpcConnection)


async def serve_grpc(
    admission: Admission,
    settings: Ingest,
    shutdown: trio.Event,
    *,
    tls: Tls | None = None,
    grace_seconds: float = 30,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hand what arrives at ``ingest.grpc_address`` to ``admission`` until ``shutdown``; see
    :func:`~betrace.service.receiver.server.serve_ingest`."""
    serve = partial(serve_ingest, tls=tls, grace_seconds=grace_seconds, protocol=GRPC)
    try:
        await serve(admission, settings, settings.grpc_address, shutdown, task_status=task_status)
    except ListenError as error:
        raise ListenError(
            f"{error}: set ingest.grpc_address (--grpc HOST:PORT), or turn OTLP over gRPC off "
            "with --grpc off"
        ) from error
