"""Response bodies of OTLP/HTTP: the export response and, for errors, ``google.rpc.Status``.

Both use the request's format: binary protobuf, or JSON by the proto3 mapping
(opentelemetry.io/docs/specs/otlp, "OTLP/HTTP Response").
"""

from __future__ import annotations

import orjson
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse


def export_response(json: bool, rejected: int = 0, message: str = "") -> bytes:
    """Return the body of a 200: an ``ExportTraceServiceResponse``.

    It is empty if nothing was rejected and there is no ``message``; otherwise it reports a partial
    success with ``rejected`` spans. OTLP allows a message without rejected spans as a warning.
    """
    if json:
        if not rejected and not message:
            return b"{}"
        partial: dict[str, str] = {}
        if rejected:
            partial["rejectedSpans"] = str(rejected)  # an int64 is a string in JSON
        if message:
            partial["errorMessage"] = message
        return orjson.dumps({"partialSuccess": partial})
    response = ExportTraceServiceResponse()
    if rejected or message:
        response.partial_success.rejected_spans = rejected
        response.partial_success.error_message = message
    return response.SerializeToString()


def status_body(json: bool, code: int, message: str) -> bytes:
    """Return the body of a 4xx or 5xx: a ``google.rpc.Status`` with a ``google.rpc.Code``."""
    if json:
        return orjson.dumps({"code": code, "message": message})
    body: bytes = Status(code=code, message=message).SerializeToString()
    return body
