"""Renders a stored trace as OTLP JSON: the spans of one trace from the request bodies.

Not on the hot path: the protobuf library reads the bodies. OTLP's JSON differs from protobuf's
in two ways: ids are hex, and enums are numbers.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span


def trace_as_json(
    bodies: Iterable[bytes], trace_id: bytes, most_spans: int | None = None
) -> dict[str, Any]:
    """Return the spans with ``trace_id`` as an OTLP JSON object, ``{"resourceSpans": [...]}``.

    ``bodies`` are accepted protobuf requests, decompressed. Of spans with the same span id, only
    the first is included. Spans of the same resource and scope are grouped, in order. Ids are
    lower-case hex, 64-bit integers are strings, and fields with their default value are omitted. Of
    more than ``most_spans`` spans, the first are included.

    Raises:
      google.protobuf.message.DecodeError: a body is not a request.
    """
    resources: dict[bytes, dict[str, Any]] = {}
    scopes: dict[tuple[bytes, bytes], dict[str, Any]] = {}
    seen: set[bytes] = set()
    for body in bodies:
        for resource_spans in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope_spans in resource_spans.scope_spans:
                # A request contains many traces: check all spans, convert few.
                found: list[dict[str, Any]] = []
                for span in scope_spans.spans:
                    if most_spans is not None and len(seen) >= most_spans:
                        break
                    if span.trace_id == trace_id and span.span_id not in seen:
                        seen.add(span.span_id)
                        found.append(_span(span))
                if not found:
                    continue
                about = ResourceSpans(
                    resource=resource_spans.resource, schema_url=resource_spans.schema_url
                )
                resource_key = about.SerializeToString(deterministic=True)
                if resource_key not in resources:
                    resources[resource_key] = _as_dict(about) | {"scopeSpans": []}
                scope = ScopeSpans(scope=scope_spans.scope, schema_url=scope_spans.schema_url)
                scope_key = (resource_key, scope.SerializeToString(deterministic=True))
                if scope_key not in scopes:
                    scopes[scope_key] = _as_dict(scope) | {"spans": []}
                    resources[resource_key]["scopeSpans"].append(scopes[scope_key])
                scopes[scope_key]["spans"] += found
    return {"resourceSpans": list(resources.values())}


def _as_dict(message: Message) -> dict[str, Any]:
    return MessageToDict(message, use_integers_for_enums=True)


def _span(span: Span) -> dict[str, Any]:
    result = _as_dict(span)
    _ids_to_hex(result)
    for link in result.get("links", ()):
        _ids_to_hex(link)
    return result


def _ids_to_hex(message: dict[str, Any]) -> None:
    """Convert the ids of a span or link from protobuf's base64 to hex."""
    for name in ("traceId", "spanId", "parentSpanId"):
        if name in message:
            message[name] = base64.b64decode(message[name]).hex()
