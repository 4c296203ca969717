"""The regression gate: is anything slower than when it was last accepted?

``python -m perf.regress`` measures each figure as CPU time, in turns with a reference that no
change of the product can affect (hashing, sorting and interpreting). A slower or busier machine
changes both. The lower quartiles of nine turns are compared: for seven figures on a machine with
twice as many busy processes as cores, their ratio varied by 3 to 4 % (standard deviation), and the
median of the turns' ratios by 3 to 5 %. If a figure's speed relative to the reference is below 90 %
of that in perf/baseline.json, it is measured twice more; if it stays below, the exit code is 1.
``--accept`` writes the median of three tries as the new baseline. Each processor has its own
baseline, because ratios differ between processors by more than the gate allows.

``PERF_SLOWDOWN=fold=1.3`` makes the figure ``fold`` 1.3 times as slow, to test the gate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trio

from betrace.service.otlp.json import to_protobuf
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.sqlite import SqliteLedger
from perf import bench
from perf.lib import everyday, rows
from perf.lib.engine import TENANT, Engine, Feed, compiled, interleaved, one_after_another
from perf.lib.workload import Shape, make_bodies, rule_definitions
from perf.report import output

BASELINE = Path(__file__).parent / "baseline.json"
LEAST = 0.9
REPEATS = 9
RETRIES = 2

Json = dict[str, Any]
Measure = Callable[[], float]  # does a fixed piece of work; CPU seconds


class Reference:
    """Do a fixed piece of work that is not part of the product; return CPU seconds."""

    def __init__(self) -> None:
        self._data = bytes(range(256)) * 4096
        self._numbers = np.random.default_rng(1).integers(0, 1 << 62, 200_000)

    def __call__(self) -> float:
        began = time.thread_time()
        hashlib.blake2b(self._data).digest()
        np.sort(self._numbers)
        total = 0
        for i in range(100_000):
            total += i ^ (i >> 3)
        return time.thread_time() - began


def figures(directory: Path) -> dict[str, Measure]:
    """Return the figures."""
    body = [bytes(b.data) for b in make_bodies(Shape(), 8)]
    texts = [bytes(b.data) for b in make_bodies(Shape(encoding="json"), 8)]
    feed = Feed()
    rules = compiled(100)
    numbers = iter(range(1 << 21, 1 << 60, 1 << 21))
    book = SqliteLedger(directory / "ledger.sqlite", "normal")
    store = DuckStore(directory / "duck")
    serial = iter(range(0, 1 << 60, 100_000))

    def cpu(work: Callable[[], object]) -> Measure:
        def measure() -> float:
            began = time.process_time()
            work()
            return time.process_time() - began

        return measure

    def engine(part: str, length: int, open_traces: int) -> Measure:
        made = Engine(rules, feed)

        def measure() -> float:
            made.cost = type(made.cost)()
            first = next(numbers)
            if open_traces:
                batches = interleaved(open_traces, 10, first)
            else:
                batches = one_after_another(length, 60, first)
            for trace_numbers, roots in batches:
                made.fold(trace_numbers, roots)
            made.close()
            return float(getattr(made.cost, part)) / made.cost.spans / 1e4  # 100 000 spans

        return measure

    def record() -> None:
        book.record(rows.make_signals(128, next(serial)))

    def signals() -> None:
        store.write(TENANT, signals=rows.make_signals(1000, next(serial)))

    due = rows.closed_traces(1000)

    def traces() -> None:
        due.rows[:, 0] = np.arange(1000) + next(serial)
        store.write(TENANT, traces=trace_table(due))

    stage = trio_stage(directory, body)
    definitions = [make_rule(d) for d in rule_definitions(100)]
    return {
        "decode": cpu(lambda: [scan_bodies(TENANT, [b]) for b in body]),
        "decode together": cpu(lambda: scan_bodies(TENANT, body)),
        "decode json": cpu(lambda: [to_protobuf(text) for text in texts]),
        "ingestion stage": stage,
        "fold": engine("fold", 10, 0),
        "fold, 30 000 open": engine("fold", 10, 30_000),
        "fold, long trace": engine("fold", 30_000, 0),
        "close and decide": engine("close", 10, 0),
        "compile rules": cpu(lambda: compile_rules(definitions, "1")),
        "ledger, 128 signals": cpu(record),
        "duckdb, 1000 signals": cpu(signals),
        "duckdb, 1000 traces": cpu(traces),
    }


def trio_stage(directory: Path, bodies: list[bytes]) -> Measure:
    """Measure 20 calls of the span-ingestion stage with all bodies. Each uses a new log, because in
    a growing log, a write takes twice the CPU after some 350 MB, when the kernel has no more
    recycled pages."""

    def measure() -> float:
        with tempfile.TemporaryDirectory(dir=directory) as log:
            return trio.run(bench.ingest_many, Path(log), bodies, 20)

    return measure


def _slowdowns() -> dict[str, float]:
    given = os.environ.get("PERF_SLOWDOWN", "")
    pairs = (pair.rsplit("=", 1) for pair in given.split(",") if pair)
    return {name: float(factor) for name, factor in pairs}


def _slowed(measure: Measure, factor: float) -> Measure:
    """Return the same measurement with proportional idle work added."""

    def slower() -> float:
        own = measure()
        began = time.thread_time()
        while (wasted := time.thread_time() - began) < own * (factor - 1):
            pass
        return own + wasted

    return slower


def speed(name: str, measure: Measure, reference: Measure) -> Json:
    """Return the speed as a ratio to the reference. The lower quartile of the repeats of each
    counts, because other processes only add to the time."""
    if name in _slowdowns():
        measure = _slowed(measure, _slowdowns()[name])
    measure()
    own, beside = [], []
    for _ in range(REPEATS):
        beside.append(reference())
        own.append(measure())
    scale = sorted(own)[REPEATS // 4]
    return {
        "speed": sorted(beside)[REPEATS // 4] / scale,
        "min": min(own) / scale,
        "max": max(own) / scale,
    }


@dataclass(frozen=True, slots=True)
class Judged:
    """A figure beside the accepted one, which is None for a new figure. ``found`` is the fastest of
    ``tries``."""

    name: str
    found: Json
    accepted: float | None
    tries: int

    @property
    def good(self) -> bool:
        """Whether it is at least ``LEAST`` times as fast as accepted."""
        return self.accepted is None or self.found["speed"] >= LEAST * self.accepted

    def row(self) -> tuple[str, ...]:
        """Return its row of the table."""
        ratio = None if self.accepted is None else self.found["speed"] / self.accepted
        verdict = "new" if ratio is None else "ok" if self.good else "SLOWER"
        return (
            self.name,
            f"{self.found['speed']:.4g}",
            f"{self.found['min']:.2f}–{self.found['max']:.2f}",
            "–" if ratio is None else f"{ratio:.2f}",
            str(self.tries),
            verdict,
        )


def judge(name: str, measure: Measure, reference: Measure, accepted: float | None) -> Judged:
    """Measure a figure, and up to ``RETRIES`` times more while it is too slow: other processes slow
    down one try, a change of the product slows down all."""
    judged = Judged(name, speed(name, measure, reference), accepted, 1)
    while not judged.good and judged.tries <= RETRIES:
        again = speed(name, measure, reference)
        found = max(judged.found, again, key=lambda each: float(each["speed"]))
        judged = Judged(name, found, accepted, judged.tries + 1)
    return judged


def measured(name: str, measure: Measure, reference: Measure, accepted: float | None) -> Judged:
    """Return the median of as many tries as a comparison may have, to be accepted."""
    tries = sorted(
        (speed(name, measure, reference) for _ in range(RETRIES + 1)),
        key=lambda each: float(each["speed"]),
    )
    return Judged(name, tries[len(tries) // 2], accepted, len(tries))


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="write the new baseline")
    parser.add_argument("--only", nargs="+", metavar="FIGURE", help="only these figures")
    options = parser.parse_args(given)
    if options.accept and _slowdowns():
        sys.exit("a run with PERF_SLOWDOWN cannot be accepted")
    facts = output.machine()
    processors: Json = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    figures_before: Json = processors.get(facts["cpu"], {}).get("figures", {})
    reference = Reference()
    reference()
    judged: list[Judged] = []
    with (
        tempfile.TemporaryDirectory(prefix="betrace-perf-", dir=os.environ.get("PERF_TMP")) as d,
        everyday.figures() as of_service,
    ):
        measures = figures(Path(d)) | of_service
        for name in [*(options.only or []), *_slowdowns()]:
            if name not in measures:
                sys.exit(f"unknown figure {name!r}; the figures are {', '.join(measures)}")
        for name in options.only or measures:
            accepted = figures_before.get(name, {}).get("speed")
            if options.accept:
                judged.append(measured(name, measures[name], reference, accepted))
            else:
                judged.append(judge(name, measures[name], reference, accepted))
    found = {each.name: each.found for each in judged}
    slower = [each.name for each in judged if not each.good]
    head = ["figure", "speed ÷ reference", "spread of its time", "÷ accepted", "tries", ""]
    rows = [each.row() for each in judged]
    text = "\n".join([f"Regression. {output.describe(facts)}.", "", output.table(head, rows)])
    print(text)
    output.say_saved("regress", {"machine": facts, "figures": found, "slower": slower}, text)
    if options.accept:
        kept = figures_before | found if options.only else found
        processors[facts["cpu"]] = {"machine": facts, "figures": kept}
        BASELINE.write_text(json.dumps(processors, indent=1, ensure_ascii=False) + "\n")
        print(f"\naccepted: {os.path.relpath(BASELINE, output.ROOT)}")
    elif not figures_before:
        sys.exit(
            f"\nthere is no baseline for this processor ({facts['cpu']}): run with --accept once, "
            "on a build that is known to be good"
        )
    elif slower:
        sys.exit(f"\nbelow {LEAST:.0%} of the accepted speed: {', '.join(slower)}")


if __name__ == "__main__":
    main()
