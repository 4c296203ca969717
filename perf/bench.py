"""Micro-benchmarks of the critical paths, and the latency from a span to its signal under load.

The paths are ingestion, evaluation, ledger, DuckDB and caches. ``python -m perf.bench`` runs each
benchmark three times to warm up and five times to measure.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.channels import ReceiveChannel, SendChannel, ThreadRunner, open_channel
from betrace.service.cli.garbage import short_pauses
from betrace.service.otlp.columns import SPAN_ID, TRACE_HI, TRACE_LO, SpanBatch
from betrace.service.otlp.json import to_protobuf
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.progress import LogProgress
from betrace.service.pipeline.request import Reply, Request
from betrace.service.pipeline.rules_in_force import LogWriter
from betrace.service.pipeline.stages.ingest import IngestStage
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.signals import Kind, rule_version, signal_id
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.due import DueTraces
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from perf.lib.bench_caches import caches
from perf.lib.bench_ledger import COUNTS, MISSING, ledger
from perf.lib.engine import TENANT, compiled
from perf.lib.quantiles import value_at
from perf.lib.rounds import (
    ROUND_SECONDS,
    ROUNDS,
    WARM_UP,
    Rounds,
    Taken,
    async_rounds,
    rounds,
    timed,
)
from perf.lib.rows import SECOND, closed_traces, make_signals
from perf.lib.target import GeneratorProcess, Service, service
from perf.lib.workload import Shape, make_bodies, rule_definitions
from perf.report import output

WINDOW = 10  # spans a batch when a trace is streamed

Json = dict[str, Any]


# Ingestion


def ingestion(directory: Path) -> dict[str, Json]:
    """Measure the span-ingestion stage for one request (decode, validate, append to the log), and
    decoding alone."""
    found = {}
    for spans in (1, 100, 1000):
        shape = Shape(spans=spans, spans_per_trace=min(spans, 10), breaches=0.0)
        bodies = [bytes(body.data) for body in make_bodies(shape, 8)]
        turn = cycle(bodies)
        found[f"decode {spans}"] = rounds(spans, partial(_decode, turn))
        texts = [bytes(body.data) for body in make_bodies(replace(shape, encoding="json"), 8)]
        found[f"decode JSON {spans}"] = rounds(spans, partial(_decode_json, cycle(texts)))
        found[f"stage {spans}"] = trio.run(_stage, directory / f"log-{spans}", spans, bodies)
    return found


def _decode(bodies: Iterator[bytes]) -> None:
    scan_bodies(TENANT, [next(bodies)])


def _decode_json(bodies: Iterator[bytes]) -> None:
    scan_bodies(TENANT, [to_protobuf(next(bodies))])


def _channel() -> tuple[SendChannel[SpanBatch], ReceiveChannel[SpanBatch]]:
    return open_channel("bench", 1 << 20, len)


def _writer(log: SpanLog, directory: Path) -> LogWriter:
    return LogWriter(log, LogProgress(), RuleRegistry(RuleStore(directory / "rules"), 10))


async def _stage(directory: Path, spans: int, bodies: Sequence[bytes]) -> Json:
    with SpanLog(directory) as log:
        send, receive = _channel()
        threads = ThreadRunner("bench", 1)
        stage = IngestStage(
            _writer(log, directory), threads, send, 1 << 24, GroupSync(log, threads)
        )
        turn = cycle(bodies)

        async def drain() -> None:
            async for _ in receive:
                pass

        async def call() -> None:
            reply = Reply()
            body = next(turn)
            await stage.handle(
                [Request(TENANT, "protobuf", "", body, time.time_ns(), spans, reply)]
            )
            await reply.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            found = await async_rounds(spans, call)
            nursery.cancel_scope.cancel()
        threads.close()
        return found


async def ingest_many(directory: Path, bodies: Sequence[bytes], calls: int) -> float:
    """Call the span-ingestion stage with all bodies at once; return CPU seconds of this process."""
    with SpanLog(directory) as log:
        send, receive = _channel()
        threads = ThreadRunner("bench", 1)
        stage = IngestStage(
            _writer(log, directory), threads, send, 1 << 24, GroupSync(log, threads)
        )
        began = time.process_time()
        for _ in range(calls):
            requests = [
                Request(TENANT, "protobuf", "", body, time.time_ns(), 1, Reply()) for body in bodies
            ]
            await stage.handle(requests)
            await receive.receive()
        spent = time.process_time() - began
        threads.close()
        return spent


# Evaluation


class _OneTrace:
    """Fold a trace whole or in windows, close it and decide it."""

    def __init__(self, spans: int, window: int) -> None:
        shape = Shape(spans=spans, spans_per_trace=spans, breaches=1.0)
        body = bytes(make_bodies(shape, 1)[0].data)
        whole = scan_bodies(TENANT, [body])
        whole.spans[:, SPAN_ID] = np.arange(1, spans + 1)
        self._windows: list[SpanBatch] = [
            replace(whole, spans=np.ascontiguousarray(whole.spans[i : i + window]))
            for i in range(0, spans, window)
        ]
        self._traces = TenantTraces(TENANT, compiled(100))
        self._number = 0
        self._now = SECOND
        self.signals = 0

    def __call__(self) -> Taken:
        self._number += 1
        for window in self._windows:
            window.spans[:, TRACE_HI] = self._number * 0x9E3779B97F
            window.spans[:, TRACE_LO] = self._number
        taken = timed(self._evaluate)
        if self._number % 4096 == 0:
            self._traces = TenantTraces(TENANT, self._traces.rules)
        return taken

    def _evaluate(self) -> None:
        for window in self._windows:
            for _, folded in self._traces.fold(window, self._now):
                if folded.early is not None:
                    self._decide(folded.early)
        self._now += SECOND
        for due in self._traces.close_due(self._now, SECOND // 2):
            self._decide(due)

    def _decide(self, due: DueTraces) -> None:
        self.signals += len(decide_due(due, self._now).signals)


def evaluation() -> dict[str, Json]:
    """Measure a trace against 100 rules, in one batch and streamed in windows."""
    found = {}
    for spans in (10, 50, 100, 500):
        for name, window in (("batch", spans), (f"streaming by {WINDOW}", WINDOW)):
            call = _OneTrace(spans, window)
            found[f"{name} {spans}"] = rounds(spans, call)
            assert call.signals, "the traces of this benchmark break a rule"
    call, measured = _OneTrace(100, 100), Rounds()
    taken = [call() for _ in range(1000)]
    measured.add(sum(t[0] for t in taken), sum(t[1] for t in taken), [t[0] for t in taken])
    found["1000 traces of 100"] = measured.result(100)
    return found


# Stores


def duckdb(directory: Path) -> dict[str, Json]:
    """Measure writing signals and traces to the query store in one transaction."""
    found = {}
    first = 0
    with DuckStore(directory / "duck") as store:
        for count in (1, 100, 1000):

            def signals(count: int = count) -> Taken:
                nonlocal first
                made = make_signals(count, first)
                first += count
                return timed(lambda: store.write(TENANT, signals=made))

            found[f"signals {count}"] = rounds(count, signals)
            due = closed_traces(count)

            def traces(count: int = count, due: DueTraces = due) -> Taken:
                nonlocal first
                due.rows[:, 0] = np.arange(first, first + count)
                first += count
                return timed(lambda: store.write(TENANT, traces=trace_table(due)))

            found[f"traces {count}"] = rounds(count, traces)
    return found


def fallback(directory: Path) -> dict[str, Json]:
    """Measure writing and syncing records to fallback files."""
    files = FallbackFiles(directory / "fallback", 1 << 30)
    found = {}
    for count in (1, 128):
        lines = [orjson.dumps(asdict(signal)) for signal in make_signals(count, 0)]
        found[f"files {count}"] = rounds(count, lambda lines=lines: files.append(lines))  # type: ignore[misc]
    files.close()
    return found


# End to end


def probe(trace: bytes) -> bytes:
    """A request with one span that breaks the first rule of the load test."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "probe"
    span = group.scope_spans.add().spans.add(trace_id=trace, span_id=b"probe-01", name="step.s000")
    span.start_time_unix_nano = time.time_ns()
    span.end_time_unix_nano = span.start_time_unix_nano + 1000
    span.attributes.add(key="order.total").value.double_value = 2000.0
    return request.SerializeToString()


def end_to_end(rate: float, probes: int, warm_up: float) -> Json:
    """Measure the milliseconds from sending the last span that a rule needs until its signal is in
    the ledger, and until the API shows it, at a constant load."""
    with service() as target:
        seconds = str(probes * 0.75 + warm_up)
        options = ["--url", f"{target.ingest}/v1/traces", "--rate", str(rate), "--spans", "100"]
        generator = GeneratorProcess([*options, "--secs", seconds, "--warm-up", str(warm_up)])
        try:
            generator.start()
            generator.wait_begin()
            taken = [_send_probe(target, i) for i in range(probes)]
            result = generator.wait_end()
        finally:
            generator.stop()
    offered = round(result["spans"] / result["seconds"])
    return {
        "rate": rate,
        "sent_per_second": offered,
        "answer_ms": _quantiles([t[0] for t in taken]),
        "ledger_ms": _quantiles([t[1] for t in taken]),
        "api_ms": _quantiles([t[2] for t in taken]),
        "probes": probes,
    }


def _quantiles(seconds: Sequence[float]) -> Json:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {key: round(1000 * value_at(ordered, q), 1) for key, q in at.items()}


def _send_probe(target: Service, number: int) -> tuple[float, float, float]:
    trace = os.urandom(16)
    condition = rule_definitions(1)[0]["condition"]
    wanted = signal_id("default", "rule-0000", rule_version(condition), trace.hex(), Kind.RAISED)
    began = time.perf_counter()
    with httpx.Client(trust_env=False) as client:
        answer = client.post(
            f"{target.ingest}/v1/traces",
            content=probe(trace),
            headers={"Content-Type": "application/x-protobuf"},
        )
    answer.raise_for_status()
    answered = time.perf_counter() - began
    ledger = target.data / "ledger.sqlite"
    book = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)
    try:
        while not book.execute(
            "SELECT 1 FROM transfers WHERE id = ?", [bytes.fromhex(wanted)]
        ).fetchone():
            _not_for_ever(began)
            time.sleep(0.002)
    finally:
        book.close()
    recorded = time.perf_counter() - began
    while not target.get(f"/api/v1/signals?trace_id={trace.hex()}")["signals"]:
        _not_for_ever(began)
        time.sleep(0.02)
    shown = time.perf_counter() - began
    time.sleep(0.05 + 0.01 * (number % 7))  # so that probes are not synchronised with the batches
    return answered, recorded, shown


def _not_for_ever(began: float) -> None:
    if time.perf_counter() - began > 30:
        raise TimeoutError("the signal of a probe did not come within 30 s")


# The report


def show(facts: Json, found: Json) -> str:
    """The report as text."""
    lines = [
        f"Benchmarks. {output.describe(facts)}.",
        f"{WARM_UP} rounds of warm-up, {ROUNDS} measured of {ROUND_SECONDS} s; median "
        "(min–max) of the rounds' means. Spans of the load test (about 415 bytes and 9 attributes, "
        "protobuf, one in ten matches a rule), 100 rules, ack = written, no other load.",
    ]
    for group, item in (
        ("ingestion", "spans"),
        ("evaluation", "spans"),
        ("ledger", "signals"),
        ("duckdb", "rows"),
        ("caches", "look-ups"),
        ("fallback", "signals"),
    ):
        if group not in found:
            continue
        rows: list[tuple[str, ...]] = [
            (
                name,
                output.shown(r["wall_us"], 1),
                output.shown(r["cpu_us"], 1),
                f"{r['p99_us']:,.1f}",
                f"{r['items_per_second']:,}",
            )
            for name, r in found[group].items()
        ]
        head = [group, "µs a call", "CPU, µs a call", "p99, µs", f"{item}/s"]
        lines += ["", output.table(head, rows)]
        if group == "ledger" and f"tigerbeetle {COUNTS[0]}" not in found[group]:
            lines += ["", f"TigerBeetle not measured: {MISSING}."]
    if "end_to_end" in found:
        e = found["end_to_end"]
        keys = ("p50", "p95", "p99", "max")
        rows = [
            (name, *(f"{e[key][q]:,.1f}" for q in keys))
            for name, key in (
                ("answered", "answer_ms"),
                ("signal in the ledger", "ledger_ms"),
                ("signal in GET /api/v1/signals", "api_ms"),
            )
        ]
        title = f"time after sending its span, ms, at {e['sent_per_second']:,} spans/s"
        lines += ["", output.table([title, *keys], rows), "", f"{e['probes']} probes."]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ["ingestion", "evaluation", "ledger", "duckdb", "caches", "fallback", "end_to_end"]
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--rate", type=float, default=20_000, help="spans/s during the probes")
    parser.add_argument("--probes", type=int, default=40)
    parser.add_argument("--warm-up", type=float, default=2, help="seconds before the probes")
    options = parser.parse_args(given)
    facts = output.machine()
    found: Json = {}
    with (
        short_pauses(),  # as in the service
        tempfile.TemporaryDirectory(prefix="betrace-perf-", dir=os.environ.get("PERF_TMP")) as d,
    ):
        directory = Path(d)
        calls: dict[str, Callable[[], Json]] = {
            "ingestion": lambda: ingestion(directory),
            "evaluation": evaluation,
            "ledger": lambda: ledger(directory),
            "duckdb": lambda: duckdb(directory),
            "caches": lambda: caches(directory),
            "fallback": lambda: fallback(directory),
            "end_to_end": lambda: end_to_end(options.rate, options.probes, options.warm_up),
        }
        for name in options.only:
            print(f"  {name}", file=sys.stderr)
            found[name] = calls[name]()
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    text = show(facts, found)
    print(text)
    output.say_saved("bench", {"machine": facts, **found}, text)


if __name__ == "__main__":
    main()
