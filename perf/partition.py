"""The CPU of a span in a partition of a cluster, next to folding and deciding it in one process.

``python -m perf.partition`` applies the load test's spans, with 100 rules, in messages of several
sizes that arrive over log time, and packs the output. The comparison folds and decides the same
spans in batches of 4096. Everything runs on one thread, without NATS.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson

from betrace.service.cluster import output
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.config.settings import Settings
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.storage.jetstream.envelope import RulesMarker, Spans, TenantFrame, pack
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from perf.lib.workload import Body, Shape, make_bodies, rule_definitions
from perf.report.output import describe, machine, say_saved, table

SECOND = 1_000_000_000
RATE = 20_000  # spans/s of log time
FLOOR = 200_000  # spans/s per process
SIZES = (2048, 512, 64, 8)  # spans of a message

Json = dict[str, Any]


class _NoIndex:
    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, Any]:
        return {}

    def raised_of(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, Any]:
        return {}


def _bodies(size: int, spans: int) -> Iterator[tuple[bytes, int]]:
    made = make_bodies(Shape(spans=size), 64)
    first = 0
    for sent in range(spans // size):
        body: Body = made[sent % len(made)]
        body.renew(sent, first)
        first += body.traces
        yield bytes(body.data), body.spans


def partition(size: int, spans: int, tenants: int = 1) -> Json:
    """CPU microseconds a span of a partition's parts."""
    settings = Settings.model_validate({"traces": {"idle_seconds": 2}})
    log: Any = None
    state = PartitionState(0, 1, settings, log, _NoIndex())
    now = 1_800_000_000 * SECOND
    names = [f"t{k}" for k in range(tenants)]
    definitions = orjson.dumps(rule_definitions(100))
    messages = [
        LogMessage(k + 1, now, pack(RulesMarker(name, k + 1, definitions)))
        for k, name in enumerate(names)
    ]
    for number, (data, count) in enumerate(_bodies(size, spans)):
        now += count * SECOND // RATE
        frame = TenantFrame(names[number % tenants], now, count, data)
        messages.append(LogMessage(len(messages) + 1, now, pack(Spans([frame]))))
    state.apply(messages[:tenants])
    apply = packing = 0.0
    traces = signals = steps = 0
    gc.collect()
    gc.disable()
    for at in range(tenants, len(messages), 64):
        began = time.thread_time()
        found = state.apply(messages[at : at + 64])
        apply += time.thread_time() - began
        if found is None:
            continue
        began = time.thread_time()
        output.pack(found)
        packing += time.thread_time() - began
        state.stored(found.step, at)
        signals += sum(len(each.signals) for each in found.decided)
        traces += sum(len(each.closed) for each in found.decided if each.closed is not None)
        steps = found.step
    gc.enable()
    done = state.counts.spans
    return {
        "apply": 1e6 * apply / done,
        "pack": 1e6 * packing / done,
        "all": 1e6 * (apply + packing) / done,
        "signals": signals,
        "traces": traces,
        "steps": steps,
    }


def embedded(spans: int) -> float:
    """CPU microseconds a span of decoding, folding, closing and deciding in one process."""
    rules = compile_rules([make_rule(each) for each in rule_definitions(100)], "perf")
    traces, closed = TenantTraces("t", rules), ClosedTraces(1 << 20)
    now, waiting = SECOND, list(_bodies(512, spans))
    gc.collect()
    gc.disable()
    began = time.thread_time()
    for at in range(0, len(waiting), 8):
        some = waiting[at : at + 8]
        batch = scan_bodies("t", [data for data, _ in some])
        batch.positions = np.arange(at + 1, at + 1 + len(some))
        now += len(batch) * SECOND // RATE
        batch.received_ns = now
        for _, folded in traces.fold(batch, now, closed):
            if folded.early:
                decide_due(folded.early, now)
        for due in traces.close_due(now, 2 * SECOND):
            decide_due(due, now)
        traces.evict(now, 5 * SECOND, 10_000, closed)
    took = time.thread_time() - began
    gc.enable()
    return 1e6 * took / sum(count for _, count in waiting)


def measure(spans: int, repeats: int) -> Json:
    """All of it, in turn; the first round warms up."""
    base: list[float] = []
    rows: dict[str, list[Json]] = {}
    for number in range(repeats + 1):
        found = embedded(spans)
        kinds = {str(size): partition(size, spans) for size in SIZES}
        kinds["512, 50 tenants"] = partition(512, spans, 50)
        if number:
            base.append(found)
            for kind, row in kinds.items():
                rows.setdefault(kind, []).append(row)
    embedded_us = statistics.median(base)
    return {
        "embedded_us": embedded_us,
        "messages": {
            kind: {
                **{k: statistics.median(each[k] for each in some) for k in some[0]},
                "ratio": statistics.median(each["all"] for each in some) / embedded_us,
                "spans_per_second": 1e6 / statistics.median(each["all"] for each in some),
            }
            for kind, some in rows.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found = measure(arguments.spans, arguments.repeats)
    rows = [
        (
            kind,
            f"{row['apply']:.2f}",
            f"{row['pack']:.2f}",
            f"{row['spans_per_second']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['steps']:.0f}",
        )
        for kind, row in found["messages"].items()
    ]
    head = ("spans a message", "apply, µs a span", "pack", "spans/s", "÷ embedded", "steps")
    facts = machine()
    text = f"{describe(facts)}\nembedded: {found['embedded_us']:.2f} µs a span\n\n"
    text += table(head, rows)
    print(text)
    say_saved("partition", {"machine": facts, **found}, text)


if __name__ == "__main__":
    main()
