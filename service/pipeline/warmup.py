"""Compiles the kernels before the service is ready, by running each once."""

from __future__ import annotations

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp import json, wire
from betrace.service.otlp.columns import TRACE_HI, TRACE_LO
from betrace.service.otlp.subset import spans_of, wanted_traces
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.rules.syntax import Attribute, Scope
from betrace.service.traces.decide import decide
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.trace_spans import trace_spans

_RULES = (
    "when { warm.up.where(a == 1 and b contains x) } always { up.* }",
    "count(warm.up) > 1 or warm.up before x",
)


def _sample() -> bytes:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in (1, 2):
        span = spans.add(trace_id=b"t" * 16, span_id=bytes([number] * 8), name="warm.up")
        span.attributes.add(key="a").value.int_value = 1
    return request.SerializeToString()


def warm_up() -> None:
    """Compile every kernel that a request needs, or load it from the cache on disk."""
    wire.warm_up()
    json.warm_up()
    rules = [
        make_rule({"id": f"r{i}", "condition": condition}) for i, condition in enumerate(_RULES)
    ]
    traces = TenantTraces("warm-up", compile_rules(rules, "warm-up"))
    batch = wire.scan_bodies("warm-up", [_sample()])
    for _, folded in traces.fold(batch, 1):
        if folded.early is not None:
            decide(folded.early)
    ids = {(int(row[TRACE_HI]), int(row[TRACE_LO])) for row in batch.spans}
    part = wire.scan_bodies("warm-up", [spans_of(_sample(), wanted_traces(lo for _, lo in ids))])
    for _, span in trace_spans(part, ids):
        span.read(Attribute(Scope.ANY, "a"))
    for due in traces.close_due(10, 1, 1):
        decide(due)
    closed = ClosedTraces(1 << 12)
    traces.fold(batch, 20, closed)  # reopens them
    traces.close_due(40, 1)
    traces.evict(10**10, 1, 0, closed)
    traces.fold(batch, 10**10, closed)
