"""OTLP responses, parsed as by clients."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from betrace.service.otlp.response import export_response, status_body


def test_full_success_is_an_empty_message() -> None:
    assert export_response(json=False) == b""
    assert export_response(json=True) == b"{}"


@pytest.mark.parametrize(
    ("rejected", "message"), [(3, "3 spans had no trace id"), (2**40, "grüße"), (0, "warning")]
)
def test_partial_success(rejected: int, message: str) -> None:
    read = ExportTraceServiceResponse.FromString(export_response(False, rejected, message))
    assert read.partial_success.rejected_spans == rejected
    assert read.partial_success.error_message == message
    assert json_format.Parse(export_response(True, rejected, message), type(read)()) == read


def test_a_count_is_a_string_in_json() -> None:
    assert json.loads(export_response(True, 7)) == {"partialSuccess": {"rejectedSpans": "7"}}


def test_status() -> None:
    read = Status.FromString(status_body(False, 8, "too many requests"))
    assert (read.code, read.message) == (8, "too many requests")
    assert json_format.Parse(status_body(True, 8, "too many requests"), Status()) == read
