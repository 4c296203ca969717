"""The API's queries on a large tenant: ten million traces and half a million signals.

``python -m perf.bench_queries`` writes the rows with the store's writer to a temporary directory
(about 1 GB), runs each query once cold and then several times, and writes perf/out/queries.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.duck.search import TraceFilter
from betrace.service.storage.duck.store import DuckStore
from perf.lib.rows import make_signals, trace_of
from perf.report import output

TENANT = "shop"
SECOND = 10**9
START = 1_790_000_000 * SECOND
STEP = 60_000_000  # nanoseconds between traces: ten million span a week
BATCH = 100_000
MOST_MS = 100.0  # for a page of signals or traces

Json = dict[str, Any]
Question = Callable[[], object]


def rows(first: int, count: int, random: np.random.Generator, every: int = 0) -> Json:
    """Return columns of closed traces: random ids, increasing times, few services and names. One in
    ``every`` has a signal."""
    at = START + np.arange(first, first + count) * STEP
    ids = random.integers(-(2**63), 2**63 - 1, (count, 2))
    if every:
        numbers = range(-(-first // every), -(-(first + count) // every))
        halves = np.array([divmod(trace_of(number), 2**64) for number in numbers], np.uint64)
        ids[-first % every :: every] = halves.view(np.int64).reshape(-1, 2)
    names = pa.array([f"GET /api/{k}" for k in range(200)])
    services = pa.array([f"service-{k}" for k in range(50)])
    three = random.integers(0, 50, (count, 3))
    duration = random.exponential(80e6, count).astype(np.int64)
    return {
        "trace_hi": ids[:, 0],
        "trace_lo": ids[:, 1],
        "start_ns": at + random.integers(0, 5 * SECOND, count),
        "end_ns": at + duration + 5 * SECOND,
        "first_seen_ns": at,
        "last_seen_ns": at + 6 * SECOND,
        "spans": random.integers(3, 40, count),
        "errors": random.integers(0, 2, count),
        "root_name": names.take(pa.array((200 * random.random(count) ** 3).astype(np.int64))),
        "root_service": services.take(pa.array(three[:, 0])),
        "services": pa.ListArray.from_arrays(
            pa.array(np.arange(0, 3 * count + 1, 3), pa.int32()),
            services.take(pa.array(three.ravel())),
        ),
        "positions": (
            np.repeat(np.arange(first, first + count) * 700, 2) + np.tile([0, 300], count),
            np.arange(0, 2 * count + 1, 2),
        ),
        "partial": np.zeros(count, np.bool_),
        "rules_version": pa.repeat("v1", count),
    }


def fill(store: DuckStore, traces: int, signals: int) -> Json:
    """Write the rows, traces first; return rows a second."""
    random = np.random.default_rng(7)
    spent_traces = spent_signals = 0.0
    for first in range(0, traces, BATCH):
        columns = rows(first, min(BATCH, traces - first), random, max(1, traces // signals))
        began = time.perf_counter()
        store.write(TENANT, traces=columns)
        spent_traces += time.perf_counter() - began
    step = max(1, signals // 500)
    for first in range(0, signals, step):
        made = make_signals(step, first)
        began = time.perf_counter()
        store.write(TENANT, signals=made)
        spent_signals += time.perf_counter() - began
    return {
        "traces_per_second": round(traces / spent_traces),
        "signals_per_second": round(signals / spent_signals),
    }


def ask(question: Question, repeats: int) -> Json:
    """Return the milliseconds of the first run and of the others."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        question()
        taken.append((time.perf_counter() - began) * 1e3)
    return {"first_ms": round(taken[0], 1), "ms": output.spread(taken[1:], 2)}


def questions(store: DuckStore, traces: int) -> dict[str, Question]:
    """Return the queries of the API and the stages."""
    page, following, _ = store.traces(TENANT, limit=100)
    middle = START + traces // 2 * STEP
    _, deep, _ = store.traces(TENANT, TraceFilter(until=middle), limit=100)
    found, after = store.signals(TENANT, limit=100)
    ids = [row.trace_id for row in store.traces(TENANT, TraceFilter(until=middle), limit=100)[0]]
    one = found[0].signal
    times = [each.signal.detected_at for each in found]
    day = 86_400 * SECOND
    return {
        "traces, first page of 100": lambda: store.traces(TENANT, limit=100),
        "traces, next page": lambda: store.traces(TENANT, limit=100, cursor=following),
        "traces, page from the middle": lambda: store.traces(TENANT, limit=100, cursor=deep),
        "traces, page of 1000": lambda: store.traces(TENANT, limit=1000),
        "traces of a service": lambda: store.traces(TENANT, TraceFilter(service="service-7")),
        "traces of a rare root name": lambda: store.traces(
            TENANT, TraceFilter(name="GET /api/199")
        ),
        "traces of a root name there is not": lambda: store.traces(
            TENANT, TraceFilter(name="none")
        ),
        "traces of an hour, of a service": lambda: store.traces(
            TENANT, TraceFilter(service="service-7", since=middle, until=middle + 3600 * SECOND)
        ),
        "traces longer than 6 s": lambda: store.traces(
            TENANT, TraceFilter(min_duration=6 * SECOND)
        ),
        "traces with a signal": lambda: store.traces(TENANT, TraceFilter(has_signal=True)),
        "traces with a signal, next page": lambda: store.traces(
            TENANT, TraceFilter(has_signal=True), cursor=following
        ),
        "traces without a signal": lambda: store.traces(TENANT, TraceFilter(has_signal=False)),
        "traces of a service, with a signal": lambda: store.traces(
            TENANT, TraceFilter(service="service-7", has_signal=True)
        ),
        "one trace": lambda: store.trace(TENANT, page[50].trace_id),
        "100 traces by id": lambda: store.find_traces(TENANT, ids),
        "an unknown trace": lambda: store.trace(TENANT, "ab" * 16),
        "signals, first page of 100": lambda: store.signals(TENANT, limit=100),
        "signals, next page": lambda: store.signals(TENANT, limit=100, cursor=after),
        "signals of a rule": lambda: store.signals(TENANT, SignalFilter(rule=one.rule_id)),
        "signals of a trace": lambda: store.signals(TENANT, SignalFilter(trace_id=one.trace_id)),
        "one signal": lambda: store.signal(TENANT, one.id),
        "summary of a day by hour": lambda: store.summary(
            TENANT, max(times) - day, max(times) + 1, 3600 * SECOND
        ),
        "summary of everything": lambda: store.summary(TENANT, 0, 2**63 - 1, 2**63 - 1),
        "signals after the last but 100": lambda: store.signals_after(TENANT, found[-1].seq),
    }


def show(values: Json) -> str:
    """The report as text."""
    rows = [
        (name, f"{answer['first_ms']:,.1f}", output.shown(answer["ms"], 1))
        for name, answer in values["answers"].items()
    ]
    written = ", ".join(f"{name} {value:,}" for name, value in values["written"].items())
    return "\n".join(
        [
            f"Queries. {output.describe(values['machine'])}.",
            f"One tenant with {values['traces']:,} traces and {values['signals']:,} signals, "
            f"{values['file_mb']:,} MB; memory grew by {values['rss_growth_mb']} MB.",
            "",
            output.table(["", "first, ms", "then, ms"], rows),
            "",
            f"Writing: {written}.",
        ]
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=10_000_000)
    parser.add_argument("--signals", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(given)
    facts = output.machine()
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with DuckStore(path) as store:
            written = fill(store, options.traces, options.signals)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        before = process.memory_info().rss
        answers = {}
        with DuckStore(path) as store:
            began = time.perf_counter()
            store.counts(TENANT)
            opened = time.perf_counter() - began
            for name, question in questions(store, options.traces).items():
                answers[name] = ask(question, options.repeats)
                print(f"  {name}: {answers[name]}", file=sys.stderr)
            random = np.random.default_rng(8)
            began = time.perf_counter()
            store.write(TENANT, traces=rows(options.traces, 1000, random))
            first_write = time.perf_counter() - began
            batches = [rows(options.traces + 1000 * (k + 1), 1000, random) for k in range(50)]
            began = time.perf_counter()
            for batch in batches:
                store.write(TENANT, traces=batch)
            at_size = 50_000 / (time.perf_counter() - began)
            began = time.perf_counter()
            store.write(TENANT, traces=batches[0])
            again = time.perf_counter() - began
        grown = process.memory_info().rss - before
    values = {
        "machine": facts,
        "traces": options.traces,
        "signals": options.signals,
        "file_mb": round(size / 1e6),
        "written": written
        | {
            "opening_ms": round(opened * 1e3, 1),
            "first_write_ms": round(first_write * 1e3, 1),
            "traces_per_second_at_size": round(at_size),
            "same_1000_again_ms": round(again * 1e3, 1),
        },
        "rss_growth_mb": round(grown / 1e6),
        "answers": answers,
        "slower_than_100_ms": [
            name for name, answer in answers.items() if answer["ms"]["median"] > MOST_MS
        ],
    }
    text = show(values)
    print(text)
    output.say_saved("queries", values, text)


if __name__ == "__main__":
    main()
