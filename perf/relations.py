"""The cost of rules that relate spans: CPU a span, memory of a trace, and time of a verdict.

``python -m perf.relations`` runs the service with 100 rules of the old kind, and with 80 of them
and twenty that relate spans, in turns. One trace in ten is a candidate. Then it measures on one
thread, with bodies in a span log on disk: what the twenty rules add to folding, closing and
deciding, for several shares of candidates; and single candidates of 10 spans and more.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
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
from betrace.service.traces.reading_pace import ReadingPace
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from perf import load
from perf.lib.relational_rules import relational_definitions
from perf.lib.workload import Body, Shape, make_bodies, rule_definitions
from perf.report import output
from perf.report.charts import Series, chart

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
        # Open traces are read for 2 % of this thread's time, as if the machine were busy.
        pace = ReadingPace(burst_ns=2_000_000, clock_ns=time.thread_time_ns)
        self._relational = RelationalRules(self._read_back.traces, pace=pace)
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


@dataclass(frozen=True, slots=True)
class Share:
    """A load in which so many traces are candidates: how many steps it has, and the first step and
    the least total of the relational rules. One span of a trace in ten is a step."""

    share: float
    steps: int = 100
    first: int = 80
    least_total: float = 450

    def rules(self, relational: bool) -> CompiledRules:
        """100 rules, with or without the twenty that relate spans."""
        rules = rule_definitions(80 if relational else 100)
        rules += relational_definitions(self.first, self.least_total) if relational else []
        return compile_rules([make_rule(each) for each in rules], "perf")


# The fold decides about half of the traces that have a step of a relational rule.
SHARES = (
    Share(0.01, least_total=818),
    Share(0.055),  # as in perf.load
    Share(0.1, least_total=80),
    Share(0.5, steps=22, first=2, least_total=-1),
)


def whole_service(repeats: int, seconds: float) -> Json:
    """The CPU of a span in the whole service until everything is stored, without and with
    relational rules, in turns."""
    given = f"--spans 512 --repeats 1 --idle 2 --secs {seconds} --warm-up {seconds / 4}".split()
    rows: dict[str, list[float]] = {"old": [], "relational": []}
    by_thread: dict[str, Json] = {}
    for _ in range(repeats):
        for kind, own in rows.items():
            options = load.parse([*given, *(["--relational"] if kind == "relational" else [])])
            found, _ = load.measure(options, 512)
            own.append(found["summary"]["cpu_us_per_span_to_the_end"]["median"])
            by_thread[kind] = found["runs"][-1]["threads_to_the_end"]
    ratios = [new / old for old, new in zip(rows["old"], rows["relational"], strict=True)]
    return {
        "ratio": output.spread(ratios),
        **{f"{kind}_us": output.spread(own) for kind, own in rows.items()},
        "threads": by_thread,
    }


def on_the_path(directory: Path, repeats: int, share: Share) -> Json:
    """The CPU of a span on one thread without and with relational rules, in turns."""
    bodies = make_bodies(Shape(rules=share.steps), 64)
    rows: dict[str, list[Json]] = {"old": [], "relational": []}
    with SpanLog(directory) as log:
        runs = {kind: Run(log, kind, share.rules(kind == "relational"), 50_000) for kind in rows}
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
    candidates = last["read"] / (last["spans"] / 10)
    return {
        "candidates": round(candidates, 4),
        "old_us": round(old, 3),
        "relational_us": round(new, 3),
        "added_us": round(new - old, 3),
        "candidate_us": round(10 * (new - old) / candidates, 1) if candidates else 0.0,
        "steps": {
            kind: {
                step: round(statistics.median(r.get(step, 0.0) for r in of), 3)
                for step in ("decode", "fold", "early", "close", "decide")
            }
            for kind, of in rows.items()
        },
    }


def trace_length(directory: Path, most: int, spans_max: int) -> list[Json]:
    """Candidates that are read back alone: the most memory that deciding takes, and its time. They
    are candidates of all twenty rules, unless they are short."""
    points = []
    for length in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        if length > most:
            break
        shape = Shape(spans=min(length, 1000), spans_per_trace=length, rules=20)
        bodies = make_bodies(shape, 8)
        with SpanLog(directory / str(length)) as log:
            run = Run(log, "long", Share(1.0, 20, 0, -1).rules(True), spans_max)
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
                    "decide_ms": round(1e3 * run.cost["decide"], 3),
                    "seconds": round(time.perf_counter() - began, 3),
                    "peak_mb": round(memory / 1e6, 2),
                    "read": run.read,
                    "undecided": run.undecided,
                }
            )
            print(points[-1], file=sys.stderr)
    return points


def show(values: Json) -> str:
    """The report as text."""
    said = [f"{output.describe(values['machine'])}.", ""]
    said += [
        "Twenty rules of every kind that relate spans among 100, traces of 10 spans. A *candidate* "
        "is a trace that the fold cannot decide; its spans are read from the log.",
        "",
    ]
    whole = values.get("service")
    if whole:
        good = "reached" if whole["ratio"]["median"] <= FLOOR else "MISSED"
        said += [
            "The whole service until everything is stored, one trace in ten a candidate: "
            f"{output.shown(whole['relational_us'])} µs a span with the twenty rules, "
            f"{output.shown(whole['old_us'])} with 100 rules of the old kind, in turns: "
            f"{output.shown(whole['ratio'])} times as much. Floor of {FLOOR:g}: {good}.",
            "",
        ]
    said += ["Decoding, folding, closing and deciding on one thread, without HTTP and stores:", ""]
    head = ["candidates", "old rules, µs a span", "with the twenty", "ratio", "µs a candidate"]
    rows = [
        (
            f"{p['candidates']:.1%}",
            f"{p['old_us']:.2f}",
            f"{p['relational_us']:.2f}",
            f"{p['relational_us'] / p['old_us']:.2f}",
            f"{p['candidate_us']:.0f}",
        )
        for p in values["shares"]
    ]
    said += [
        output.table(head, rows),
        "",
        f"![Share of candidates]({output.PICTURES_LINK}/relations-share.svg)",
    ]
    said += [
        "",
        f"One candidate of all rules. Above {values['spans_max']:,} spans it is not read but "
        "undecided.",
        "",
    ]
    head = ["spans", "most memory, MB", "time to decide, ms", "µs a span", "read"]
    rows = [
        (
            f"{p['spans']:,}",
            f"{p['peak_mb']:.2f}",
            f"{p['decide_ms']:,.2f}",
            f"{p['decide_us']:.2f}",
            "no" if p["undecided"] else "yes",
        )
        for p in values["trace_length"]
    ]
    said += [output.table(head, rows), ""]
    said += [
        f"![{name}]({output.PICTURES_LINK}/relations-{name}.svg)\n" for name in ("memory", "time")
    ]
    return "\n".join(said).rstrip()


def draw(values: Json) -> None:
    """Draw the pictures."""
    output.PICTURES.mkdir(parents=True, exist_ok=True)
    shares = [
        (100 * p["candidates"], p["relational_us"] / p["old_us"])
        for p in values["shares"]
        if p["candidates"]
    ]
    lengths = values["trace_length"]
    judged = [p for p in lengths if not p["undecided"]]
    memory = [(p["spans"], p["peak_mb"]) for p in lengths]
    times = [(p["spans"], p["decide_ms"]) for p in judged]
    for name, title, x, y, points in (
        ("share", "CPU a span with relational rules", "% candidates", "ratio", shares),
        ("memory", "Memory to decide a candidate", "spans a trace", "MB", memory),
        ("time", "Time to decide a candidate", "spans a trace", "ms", times),
    ):
        if points:
            line = Series("20 relational rules of 100", [(at, mid, mid, mid) for at, mid in points])
            picture = chart(title, x, y, [line])
            (output.PICTURES / f"relations-{name}.svg").write_text(picture)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, default=1_000_000, help="spans of the longest trace")
    parser.add_argument("--spans-max", type=int, default=50_000, help="as in the settings")
    parser.add_argument("--secs", type=float, default=4, help="of load on the service; 0: none")
    options = parser.parse_args(given)
    values: Json = {"machine": output.machine(), "spans_max": options.spans_max}
    if options.secs:
        values["service"] = whole_service(max(1, options.repeats // 2), options.secs)
    with tempfile.TemporaryDirectory(prefix="betrace-perf-") as directory:
        values["shares"] = [
            on_the_path(Path(directory) / f"{each.share}", options.repeats, each) for each in SHARES
        ]
        values["trace_length"] = trace_length(Path(directory), options.most, options.spans_max)
    text = show(values)
    print(text)
    draw(values)
    output.say_saved("relations", values, text)


if __name__ == "__main__":
    main()
