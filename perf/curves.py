"""Curves that must be flat: the cost of a span, and the memory of a trace, as the length of traces
and the number of open traces, rules and tenants grow.

``python -m perf.curves`` measures each point against a reference in the same run: traces of ten
spans, a thousand open traces, a hundred rules, one tenant. The engine's curves run in this process
without HTTP. The tenants' curve runs the whole service over HTTP at an equal total rate. The
program draws docs/perf/*.svg.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from perf import load
from perf.lib.engine import (
    BATCH,
    Cost,
    Engine,
    Feed,
    Numbers,
    compiled,
    interleaved,
    one_after_another,
)
from perf.report import output
from perf.report.charts import Series, chart

GROUP = 20  # batches between closings in the reference: a thousand traces of ten spans
BATCHES = 200  # minimum of a measurement
FLAT = (0.8, 1.2)
MOST_WINDOW_BYTES = 1_000_000  # the floor for one open trace

Json = dict[str, Any]
Batches = Iterator[tuple[Numbers, "np.ndarray[Any, np.dtype[np.bool_]]"]]


class _Run:
    """Keeps engines between repeats, so that their arrays have grown before the measurement."""

    def __init__(self) -> None:
        self.next_trace = 0
        self.feed = Feed()
        self.reference_engine = Engine(compiled(100), self.feed)
        self.reference()

    def reference(self) -> Cost:
        """Measure the reference once."""
        return self.measure(
            self.reference_engine, lambda first: one_after_another(10, GROUP, first), 5
        )

    def measure(self, engine: Engine, batches: Callable[[int], Batches], groups: int) -> Cost:
        """Fold groups of batches, closing all traces after each; return the cost."""
        engine.cost = Cost()
        gc.collect()
        gc.disable()
        try:
            for _ in range(groups):
                for numbers, first in batches(self.next_trace):
                    engine.fold(numbers, first)
                self.next_trace += 1 << 21
                engine.close()
        finally:
            gc.enable()
        return engine.cost

    def point(
        self, engine: Engine, batches: Callable[[int], Batches], groups: int, repeats: int
    ) -> Json:
        """Measure a point repeatedly, each time beside the reference."""
        ratios, folds, costs = [], [], []
        for _ in range(repeats):
            reference = self.reference()
            cost = self.measure(engine, batches, groups)
            ratios.append(cost.path / reference.path)
            folds.append(cost.folding / reference.folding)
            costs.append(cost)
        return {
            "ratio": output.spread(ratios, 3),
            "fold_ratio": output.spread(folds, 3),
            "path_us": round(statistics.median(c.path for c in costs) / 1000, 3),
            "fold_us": round(statistics.median(c.folding for c in costs) / 1000, 3),
            "close_us": round(statistics.median(c.close / c.spans for c in costs) / 1000, 3),
            "spans": costs[-1].spans,
            "traces": costs[-1].traces,
        }


def _grow(engine: Engine, batches: Batches) -> Json:
    """Fold without closing, and return the memory of the open traces."""
    empty, rss = engine.traces.nbytes, psutil.Process().memory_info().rss
    for numbers, first in batches:
        engine.fold(numbers, first)
    count = engine.traces.open_count
    held = {
        "open": count,
        "allocated_bytes": engine.traces.nbytes,
        "growth_bytes": engine.traces.nbytes - empty,
        "bytes_per_trace": round(engine.bytes_in_use() / count),
        "rss_growth_mb": round((psutil.Process().memory_info().rss - rss) / 1e6, 1),
    }
    engine.close()
    return held


def trace_length(run: _Run, repeats: int, most: int) -> Json:
    """Curve over spans a trace; one trace after another in batches of 512."""
    points = []
    for length in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        if length > most:
            break
        group = max(GROUP, -(-length // BATCH))
        held = _grow(
            Engine(compiled(100), run.feed), one_after_another(length, group, run.next_trace)
        )
        run.next_trace += 1 << 21
        engine = Engine(compiled(100), run.feed)

        def batches(first: int, length: int = length, group: int = group) -> Batches:
            return one_after_another(length, group, first)

        run.measure(engine, batches, 1)
        point = run.point(engine, batches, -(-BATCHES // group), repeats)
        points.append({"x": length, **point, "memory": held})
        _say("spans a trace", points[-1])
    return {"title": "Spans in a trace", "unit": "spans a trace", "points": points}


def open_traces(run: _Run, repeats: int, most: int) -> Json:
    """Curve over open traces, whose spans arrive in random order."""
    points = []
    for count in (1000, 3000, 10_000, 30_000, 100_000):
        if count > most:
            break
        held = _grow(Engine(compiled(100), run.feed), interleaved(count, 10, run.next_trace))
        run.next_trace += 1 << 21
        engine = Engine(compiled(100), run.feed)

        def batches(first: int, count: int = count) -> Batches:
            return interleaved(count, 10, first)

        run.measure(engine, batches, 1)
        groups = -(-BATCHES * BATCH // (count * 10))
        points.append({"x": count, **run.point(engine, batches, groups, repeats), "memory": held})
        _say("open traces", points[-1])
    return {"title": "Open traces", "unit": "open traces of 10 spans", "points": points}


def long_and_many(run: _Run, traces: int, length: int) -> Json:
    """Measure many long traces at once with interleaved spans; by default 500 of 10 000 spans."""
    engine = Engine(compiled(100), run.feed)
    rss = psutil.Process().memory_info().rss
    empty = engine.traces.nbytes
    before = [run.reference() for _ in range(3)]
    engine.cost = Cost()
    tenth: list[float] = []
    folded = spent = 0
    for i, (numbers, first) in enumerate(interleaved(traces, length, run.next_trace)):
        engine.fold(numbers, first)
        if (i + 1) % (traces * length // BATCH // 10) == 0:
            tenth.append((engine.cost.fold - spent) / (engine.cost.spans - folded) / 1000)
            spent, folded = engine.cost.fold, engine.cost.spans
    held = engine.bytes_in_use() / traces
    allocated = engine.traces.nbytes - empty
    grown = (psutil.Process().memory_info().rss - rss) / 1e6
    engine.close()
    reference = statistics.median(c.path for c in [*before, run.reference()])
    return {
        "traces": traces,
        "spans_per_trace": length,
        "ratio": round(engine.cost.path / reference, 3),
        "path_us": round(engine.cost.path / 1000, 3),
        "fold_us": round(engine.cost.folding / 1000, 3),
        "fold_us_by_tenth": [round(us, 3) for us in tenth],
        "bytes_per_trace": round(held),
        "allocated_bytes": allocated,
        "rss_growth_mb": round(grown, 1),
    }


def rules(run: _Run, repeats: int, most: int) -> Json:
    """Curve over a tenant's rules; one span in ten matches one of them."""
    points = []
    for count in (10, 30, 100, 300, 1000):
        if count > most:
            break
        began = time.thread_time()
        made = compiled(count)
        compiling = time.thread_time() - began
        engine = Engine(made, Feed(count))

        def batches(first: int) -> Batches:
            return one_after_another(10, GROUP, first)

        run.measure(engine, batches, 2)
        point = run.point(engine, batches, BATCHES // GROUP, repeats)
        point["compile_ms"] = round(1000 * compiling, 1)
        points.append({"x": count, **point})
        _say("rules", points[-1])
    return {"title": "Rules of a tenant", "unit": "rules", "points": points}


def tenants(counts: Sequence[int], rate: float, seconds: float) -> Json:
    """Curve over tenants at an equal total rate, over HTTP: CPU of the whole service during the
    load.

    Rows of many tenants wait up to half a minute to be committed together, so the CPU until
    everything is stored, also reported, includes that idle time. The first run has new tenants
    (*cold*); the second, which counts, has the same tenants.
    """
    points = []
    for count in counts:
        options = load.parse(
            [f"--tenants={count}", f"--rate={rate}", f"--secs={seconds}", "--repeats=2", "--idle=2"]
        )
        row, wrong = load.measure(options, 100)
        cold, warm = row["runs"]
        points.append(
            {
                "x": count,
                "path_us": round(warm["cpu_us_per_span"], 2),
                "cold_us": round(cold["cpu_us_per_span"], 2),
                "to_the_end_us": round(warm["cpu_us_per_span_to_the_end"], 2),
                "spans_per_second": round(warm["spans_per_second"]),
                "cold_spans_per_second": round(cold["spans_per_second"]),
                "p99_ms": warm["generator"]["latency_ms"]["p99"],
                "rss_mb": round(warm["rss_mb"]),
                "threads": warm["threads"],
                "threads_to_the_end": warm["threads_to_the_end"],
                "problems": wrong,
            }
        )
        _say("tenants", points[-1])
    least = statistics.mean(p["path_us"] for p in points if p["x"] == counts[0])
    for point in points:
        point["ratio"] = output.spread([point["path_us"] / least], 3)
    return {
        "title": "Tenants at an equal total rate",
        "unit": "tenants",
        "rate": rate,
        "points": points,
    }


def _say(what: str, point: Json) -> None:
    ratio = point.get("ratio", {}).get("median", "")
    print(f"  {what} {point['x']:,}: {point['path_us']} µs a span, {ratio}", file=sys.stderr)


def draw(curves: Json) -> None:
    """Draw the pictures in docs/perf."""
    output.PICTURES.mkdir(parents=True, exist_ok=True)
    for name, curve in curves.items():
        lines = []
        whole = "service over HTTP" if name == "tenants" else "decode, fold, decide, index"
        for key, label in (("ratio", whole), ("fold_ratio", "the fold alone")):
            points = sorted(
                (float(p["x"]), p[key]["median"], p[key]["min"], p[key]["max"])
                for p in curve["points"]
                if key in p
            )
            if points:
                lines.append(Series(label, points))
        picture = chart(
            f"CPU a span: {curve['title'].lower()}",
            curve["unit"],
            "ratio to the reference",
            lines,
            FLAT,
        )
        (output.PICTURES / f"{name.replace('_', '-')}.svg").write_text(picture)
    for name in ("trace_length", "open_traces"):
        if name not in curves:
            continue
        points = [
            (float(p["x"]), *(p["memory"]["bytes_per_trace"] / 1000,) * 3)
            for p in curves[name]["points"]
        ]
        picture = chart(
            f"Memory of an open trace: {curves[name]['title'].lower()}",
            curves[name]["unit"],
            "kB a trace",
            [Series("arrays of open traces", points)],
        )
        (output.PICTURES / f"{name.replace('_', '-')}-memory.svg").write_text(picture)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most-spans", type=int, default=1_000_000, help="spans of a trace")
    parser.add_argument("--most-open", type=int, default=100_000)
    parser.add_argument("--most-rules", type=int, default=1000)
    parser.add_argument("--tenants", type=int, nargs="*", default=[1, 10, 100, 500, 1])
    parser.add_argument("--rate", type=float, default=30_000, help="spans/s for all tenants")
    parser.add_argument("--secs", type=float, default=8, help="seconds for each number of tenants")
    parser.add_argument("--many", type=int, nargs=2, default=[500, 10_000], help="traces, spans")
    options = parser.parse_args(given)
    facts = output.machine()
    run = _Run()
    curves = {
        "trace_length": trace_length(run, options.repeats, options.most_spans),
        "open_traces": open_traces(run, options.repeats, options.most_open),
        "rules": rules(run, options.repeats, options.most_rules),
    }
    many = long_and_many(run, *options.many)
    if options.tenants:
        curves["tenants"] = tenants(options.tenants, options.rate, options.secs)
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    reference = run.reference()
    values = {
        "machine": facts,
        "payload": "the load test's spans, protobuf, batches of 512, 100 rules",
        "reference_us": round(reference.path / 1000, 3),
        "reference_fold_us": round(reference.folding / 1000, 3),
        "curves": curves,
        "many_long_traces": many,
    }
    output.save("curves", values)
    draw(curves)


if __name__ == "__main__":
    main()
