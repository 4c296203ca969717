"""The calls that are offered: export of traces, and health checks (grpc.health.v1)."""

from __future__ import annotations

from typing import Final

from betrace.service.receiver.admission import Admission
from betrace.service.receiver.grpc.framing import GrpcCode, RpcStatus

_COLLECTOR: Final = "/opentelemetry.proto.collector."
EXPORT: Final = f"{_COLLECTOR}trace.v1.TraceService/Export"
# What is sent to these gets the answer that the path gets over HTTP.
HTTP_PATHS: Final = {
    EXPORT: "/v1/traces",
    f"{_COLLECTOR}logs.v1.LogsService/Export": "/v1/logs",
    f"{_COLLECTOR}metrics.v1.MetricsService/Export": "/v1/metrics",
}
CHECK: Final = "/grpc.health.v1.Health/Check"
WATCH: Final = "/grpc.health.v1.Health/Watch"
MAX_HEALTH_BYTES: Final = 1024

SERVING: Final = b"\x08\x01"
NOT_SERVING: Final = b"\x08\x02"
SERVICE_UNKNOWN: Final = b"\x08\x03"

_SERVICES: Final = frozenset({"", "opentelemetry.proto.collector.trace.v1.TraceService"})


def unimplemented(path: str) -> RpcStatus:
    """There is no such method."""
    return RpcStatus(
        GrpcCode.UNIMPLEMENTED,
        f"there is no method {path[:200]}; this port takes OTLP traces ({EXPORT})",
    )


def service_name(request: bytes) -> str | None:
    """The service that a ``HealthCheckRequest`` asks about; None where it cannot be read."""
    if not request:
        return ""
    size = request[1] if len(request) > 1 else 128
    if request[0] != 0x0A or size > 127 or len(request) != 2 + size:
        return None
    try:
        return request[2:].decode()
    except UnicodeDecodeError:
        return None


def is_known(service: str) -> bool:
    """Whether the health of ``service`` can be asked for."""
    return service in _SERVICES


def health(admission: Admission) -> bytes:
    """A ``HealthCheckResponse``: serving while requests are accepted."""
    return SERVING if admission.state == "open" else NOT_SERVING
