"""The cost of rules that relate spans, and the memory and time of reading long traces back.

``python -m perf.relations`` folds, closes and decides the load test's spans on one thread, with 100
rules of the old kind and with 80 of them and twenty that relate spans, of which one trace in ten is
a candidate. Bodies are in a span log on disk. Then it judges single traces of 10 spans and more.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.read_back import ReadBack
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from perf.lib.workload import Body, Shape, make_bodies, rule_definitions
from perf.report import output

SECOND = 1_000_000_000
GROUP = 40  # bodies between closings
FLOOR = 1.5  # times the CPU of a span with rules of the old kind
MAX_BODY = 1 << 24

Json = dict[str, Any]


class Run:
    """A tenant with its rules and its log; all costs are CPU seconds of this thread."""

    def __init__(self, log: SpanLog, tenant: str, rules: CompiledRules, spans_max: int) -> None:
        self._log = log
        self._tenant = tenant
        self._traces = TenantTraces(tenant, rules)
        self._closed = ClosedTraces(1 << 20)
        self._read_back = ReadBack(log, MAX_BODY, max_spans=spans_max)
        self._relational = RelationalRules(self._read_back.traces)
        self._now = SECOND
        self._sent = self._first = 0
        self.cost: dict[str, float] = {}
        self.spans = self.signals = self.undecided = 0

    @property
    def read(self) -> int:
        """Traces read back."""
        return self._read_back.read

    def fold(self, body: Body) -> None:
        """Append a body to the log and fold it."""
        body.renew(self._sent, self._first)
        self._sent += 1
        self._first += body.traces
        data = bytes(body.data)
        (position,) = self._log.append(
            self._tenant, [Frame("protobuf", "", self._now, data, body.spans)]
        )
        began = time.thread_time()
        batch = scan_bodies(self._tenant, [data])
        batch.positions, batch.received_ns = np.array([position], np.int64), self._now
        self._add("decode", began)
        self._now += 1_000_000
        began = time.thread_time()
        parts = self._traces.fold(batch, self._now, self._closed)
        self._add("fold", began)
        for _, folded in parts:
            self._read_back.note(self._tenant, folded.spilled)
            if folded.early:
                self._decide("early", [folded.early])
        self.spans += len(batch)

    def close(self) -> None:
        """Close and decide all traces."""
        self._now += 10 * SECOND
        began = time.thread_time()
        due = self._traces.close_due(self._now, SECOND)
        self._add("close", began)
        self._decide("decide", due)
        began = time.thread_time()
        for each in due:
            trace_table(each)
        self._add("close", began)
        self._now += 3600 * SECOND
        self._traces.evict(self._now, SECOND, 0, self._closed)

    def _decide(self, step: str, due: list[Any]) -> None:
        began = time.thread_time()
        for each in due:
            decided = decide_due(each, self._now, self._relational)
            self.signals += len(decided.signals)
            self.undecided += len(decided.undecided)
        self._add(step, began)

    def _add(self, step: str, began: float) -> None:
        self.cost[step] = self.cost.get(step, 0.0) + time.thread_time() - began


def compiled(relational: bool) -> CompiledRules:
    """The rules of the load test, with or without twenty that relate spans."""
    return compile_rules([make_rule(each) for each in rule_definitions(100, relational)], "perf")


def load(directory: Path, repeats: int) -> Json:
    """The CPU of a span with and without relational rules, in turn."""
    bodies = make_bodies(Shape(), 64)
    rows: dict[str, list[Json]] = {"old": [], "relational": []}
    with SpanLog(directory) as log:
        runs = {kind: Run(log, kind, compiled(kind == "relational"), 50_000) for kind in rows}
        for number in range(repeats + 1):
            for kind, run in runs.items():
                run.cost, run.spans, run.signals, read = {}, 0, 0, run.read
                gc.collect()
                gc.disable()
                for at in range(GROUP * 2):
                    run.fold(bodies[at % len(bodies)])
                    if (at + 1) % GROUP == 0:
                        run.close()
                gc.enable()
                if number:  # the first is to warm up
                    cost = {k: 1e6 * v / run.spans for k, v in run.cost.items()}
                    facts = {"signals": run.signals, "read": run.read - read, "spans": run.spans}
                    rows[kind].append({**cost, "all": sum(cost.values()), **facts})
    old, new = (statistics.median(r["all"] for r in rows[k]) for k in ("old", "relational"))
    last = rows["relational"][-1]
    return {
        "old_us": round(old, 3),
        "relational_us": round(new, 3),
        "added_us": round(new - old, 3),
        "candidates": round(last["read"] / (last["spans"] / 10), 4),
        "steps": {
            kind: {
                step: round(statistics.median(r.get(step, 0.0) for r in of), 3)
                for step in ("decode", "fold", "early", "close", "decide")
            }
            for kind, of in rows.items()
        },
    }


def trace_length(directory: Path, most: int, spans_max: int) -> list[Json]:
    """Traces that are candidates, read back alone: CPU, and the most memory of Python objects."""
    points = []
    for length in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        if length > most:
            break
        shape = Shape(spans=min(length, 1000), spans_per_trace=length)
        bodies = make_bodies(shape, 8)
        with SpanLog(directory / str(length)) as log:
            run = Run(log, "long", compiled(True), spans_max)
            for number in range(-(-length // shape.spans)):
                run.fold(bodies[number % len(bodies)])
            tracemalloc.start()
            run.close()
            memory = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            for number in range(-(-length // shape.spans)):
                run.fold(bodies[number % len(bodies)])
            run.cost = {}
            began = time.perf_counter()
            run.close()
            points.append(
                {
                    "spans": length,
                    "decide_us": round(1e6 * run.cost["decide"] / length, 2),
                    "seconds": round(time.perf_counter() - began, 3),
                    "peak_mb": round(memory / 1e6, 2),
                    "read": run.read,
                    "undecided": run.undecided,
                }
            )
            print(points[-1], file=sys.stderr)
    return points


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=1_000_000, help="spans of the longest trace")
    parser.add_argument("--spans-max", type=int, default=50_000, help="as in the settings")
    options = parser.parse_args(given)
    facts = output.machine()
    with tempfile.TemporaryDirectory(prefix="betrace-perf-") as directory:
        values = {
            "machine": facts,
            "load": load(Path(directory) / "load", options.repeats),
            "trace_length": trace_length(Path(directory), options.most, options.spans_max),
        }
    print(values["load"])
    output.say_saved("relations", values, str(values))


if __name__ == "__main__":
    main()
