"""Signals and closed traces for benchmarks of the stores."""

from __future__ import annotations

from betrace.service.otlp.wire import scan_bodies
from betrace.service.signals import Kind, Signal, rule_version, signal_id
from betrace.service.traces.due import DueTraces
from betrace.service.traces.tenant_traces import TenantTraces
from perf.lib.engine import TENANT, compiled
from perf.lib.workload import Shape, make_bodies, rule_definitions

SECOND = 1_000_000_000


def trace_of(number: int) -> int:
    """Return the trace id of a signal of :func:`make_signals`."""
    return number * 0x9E3779B97F4A7C15 % 2**128


def make_signals(count: int, first: int) -> list[Signal]:
    """Return signals of distinct traces, numbered from ``first``."""
    rule = rule_definitions(1)[0]
    version = rule_version(rule["condition"])
    made = []
    for i in range(first, first + count):
        trace = f"{trace_of(i):032x}"
        made.append(
            Signal(
                id=signal_id(TENANT, rule["id"], version, trace, Kind.RAISED),
                tenant=TENANT,
                rule_id=rule["id"],
                rule_version=version,
                severity="high",
                kind=Kind.RAISED,
                clause="never",
                trace_id=trace,
                detected_at=1_800_000_000 * SECOND + i,
                early=True,
                counts={"step.s000": 1, "step.s000.where(order.total > 1000)": 1},
                evidence={"step.s000": ["00000000000000aa"]},
                message="Step 0: 'never' holds",
            )
        )
    return made


def closed_traces(count: int) -> DueTraces:
    """Return closed traces of ten spans."""
    traces = TenantTraces(TENANT, compiled(100))
    body = bytes(make_bodies(Shape(spans=10 * count, breaches=0.0), 1)[0].data)
    traces.fold(scan_bodies(TENANT, [body]), SECOND)
    (due,) = traces.close_due(10 * SECOND, SECOND)
    return due
