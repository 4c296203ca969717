"""Spans of a trace for relational rules, from the shared cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from betrace.service.otlp.columns import TRACE_HI, TRACE_LO
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.read_columns import columns_of
from betrace.service.rules.trace_tree import TraceTree
from tests.support.relational_strategies import encode_cases

TRACE = b"\1" * 16


def case_trace(spans: Iterable[dict[str, Any]], first: int = 1) -> TraceTree:
    """The trace of spans in the format of the shared cases. Spans without an id are numbered from
    ``first``."""
    full = [_full(number, span) for number, span in enumerate(spans, first)]
    batch = scan_bodies("cases", [encode_cases(full, TRACE)])
    ids = tuple(batch.spans[0, [TRACE_HI, TRACE_LO]].tolist())
    return columns_of(batch, [ids]).tree(0)


def _full(number: int, span: dict[str, Any]) -> dict[str, Any]:
    """A span with everything that it leaves out."""
    resource = dict(span.get("resource", {}))
    if "service" in span:
        resource.setdefault("service.name", span["service"])
    defaults = {
        "span_id": f"{number:016x}",
        "parent_id": "",
        "start_ms": 0,
        "duration_ms": 1,
        "kind": "internal",
        "status": "unset",
        "status_message": "",
        "scope": "",
        "events": [],
        "links": [],
    }
    return {**defaults, **{k: v for k, v in span.items() if v is not None}, "resource": resource}
