"""Compares the OTLP JSON kernel with the reference decoder."""

from __future__ import annotations

import json
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp.json import OtlpJsonError, to_protobuf
from tests.support import json_reference


def _decoded(decode: Any, body: bytes) -> tuple[bytes | None, str]:
    """Return the request and "", or None and the error."""
    try:
        encoded = decode(body)
    except OtlpJsonError as error:
        return None, str(error)
    request = ExportTraceServiceRequest.FromString(encoded)
    return request.SerializeToString(deterministic=True), ""


def repeats_names(body: bytes) -> bool:
    """Whether an object in the text has a name twice."""
    found = False

    def pairs(items: list[tuple[str, Any]]) -> None:
        nonlocal found
        found = found or len({name for name, _ in items}) < len(items)

    try:
        json.loads(body, object_pairs_hook=pairs, parse_int=len)
    except RecursionError:
        return False
    return found


def check(body: bytes) -> bool:
    """Check that both accept or refuse ``body``, with the same request or error. Return whether
    they accept it.

    If names are repeated, an object's members have another order in the reference decoder, which
    may then find another of several errors first.
    """
    expected, expected_error = _decoded(json_reference.to_protobuf, body)
    found, found_error = _decoded(to_protobuf, body)
    assert found == expected, (found_error, expected_error)
    assert found_error == expected_error or repeats_names(body), (found_error, expected_error)
    return found is not None
