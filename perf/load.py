"""Load over real HTTP: the maximum rate of the whole service, and the cost of a span.

``python -m perf.load`` starts the service (acknowledged when written to the log, 100 rules, data on
disk) and sends over 8 connections with 512 and with 100 spans a request. Then it checks that every
accepted span was evaluated, and that every breach became a signal.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from betrace.service.config.edge import Ingest
from perf.lib import threads
from perf.lib.target import GeneratorProcess, Service, service
from perf.report import output

MOST_ERRORS = 0.001
FLOOR = 100_000  # spans/s
GRPC_MOST = 2.0  # times the CPU of a span over HTTP; the goal is 1.3
GZIP_RATE = 600_000  # spans/s up to which no compressed body is sent twice
MOST_GZIP_BYTES = 400e6  # of all compressed bodies, about 60 bytes a span

# Measured on one machine with two shared cores (AMD EPYC), with the generator on the same machine.
SOURCE = "measured on another machine with two cores"
OTHERS: tuple[tuple[str, str, str, str, str], ...] = (
    # what, spans/s at 512 and 100, CPU a span in µs at 512 and 100
    ("HTTP alone: Hypercorn on Trio, bare ASGI app", "564 000", "197 000", "1.8", "5.1"),
    ("HTTP alone: uvicorn with httptools", "1 819 000", "972 000", "0.4", "0.8"),
    ("prototype, log only: Hypercorn on Trio", "211 000", "112 000", "5.2", "9.6"),
    ("prototype, log only: Trio socket", "600 000–690 000", "250 000–335 000", "1.6", "2.9–4.0"),
    ("stores: Grafana Tempo", "47 000", "41 000", "26–28", "26–28"),
    ("stores: VictoriaTraces", "63 000", "40 000", "30–47", "30–47"),
    (
        "evaluates: BeTrace's Go backend, 10 rules, in memory, JSON",
        "53 000–69 000",
        "48 000–58 000",
        "28–36",
        "28–36",
    ),
    ("stores: Arize Phoenix", "9 200 (200 stored)", "2 100", "106–518", "106–518"),
    ("stores: MLflow", "785", "693", "1300–1450", "1300–1450"),
    ("drops: OpenTelemetry Collector", "332 000", "254 000", "4.9–5.7", "4.9–5.7"),
    ("drops: Rotel", "191 000–361 000", "225 000", "4.7–7.5", "4.7–7.5"),
)
GZIP_OTHERS: tuple[tuple[str, str, str, str, str], ...] = (
    ("HTTP alone: Hypercorn on Trio, bare ASGI app", "977 000", "161 000", "–", "–"),
    ("stores: Grafana Tempo", "33 000", "26 000", "–", "–"),
    ("stores: VictoriaTraces", "42 000", "38 000", "–", "–"),
    ("drops: OpenTelemetry Collector", "358 000", "225 000", "–", "–"),
)

Json = dict[str, Any]


def arguments(options: argparse.Namespace, spans: int, url: str) -> list[str]:
    """Return the generator's options for one run."""
    path = "" if url.startswith("grpc://") else "/v1/traces"
    given = ["--url", url + path, "--spans", str(spans), "--secs", str(options.secs)]
    given += ["--warm-up", str(options.warm_up), "--connections", str(options.connections)]
    given += ["--spans-per-trace", str(options.spans_per_trace), "--tenants", str(options.tenants)]
    given += ["--rate", str(options.rate), "--wrong", str(options.wrong)]
    given += ["--breaches", str(options.breaches), "--rules", str(options.rules)]
    if options.gzip:
        # Ids in a compressed body cannot be rewritten: make so many that few are sent twice.
        wanted = (options.secs + options.warm_up) * GZIP_RATE / spans
        bodies = max(options.connections, int(min(wanted, MOST_GZIP_BYTES / (60 * spans))))
        given += ["--gzip", "--bodies", str(bodies)]
    if options.json:
        given.append("--json")
    return given


def run_once(
    target: Service,
    generator: GeneratorProcess,
    options: argparse.Namespace,
    watch: Callable[[float], object] = time.sleep,
) -> Json:
    """Measure once on an idle service, and wait until everything is stored. ``watch`` is called
    with the duration of the measurement in seconds and returns at its end."""
    before = target.metrics()
    cpu_before, threads_before, start = target.cpu_seconds(), target.threads(), time.monotonic()
    generator.start()
    generator.wait_begin()
    cpu, by_thread, began = target.cpu_seconds(), target.threads(), time.monotonic()
    watch(options.secs)
    in_window, seconds = target.cpu_seconds() - cpu, time.monotonic() - began
    used = target.threads()
    rss = target.rss()
    result = generator.wait_end()
    behind = target.metrics()["spansInFlight"]
    after = target.settle(options.idle)
    all_cpu, all_used = target.cpu_seconds() - cpu_before, target.threads()
    in_all = time.monotonic() - start
    spans, told = result["spans"], result["all_spans"]
    accepted, evaluated, signals = (
        after[key] - before[key] for key in ("spansAccepted", "spansEvaluated", "signalsRaised")
    )
    requests = result["requests"] + sum(result["errors"].values())
    return {
        "spans_per_second": spans / result["seconds"],
        "cpu_us_per_span": 1e6 * in_window / spans if spans else 0.0,
        "cpu_us_per_span_to_the_end": 1e6 * all_cpu / told if told else 0.0,
        "service_cores": in_window / seconds,
        "generator_cores": result["cpu_seconds"] / result["seconds"],
        "generator_us_per_span": 1e6 * result["cpu_seconds"] / spans if spans else 0.0,
        "error_rate": sum(result["errors"].values()) / max(1, requests),
        "rss_mb": rss / 1e6,
        "behind_at_end": behind,
        "accepted": accepted,
        "evaluated": evaluated,
        "told_accepted": told,
        "unknown": result["all_unknown_spans"],
        "signals": signals,
        "breaches_sent": result["all_breaches"],
        "threads": threads.between(by_thread, used, seconds, spans, in_window),
        "threads_to_the_end": threads.between(threads_before, all_used, in_all, told, all_cpu),
        "generator": result,
    }


def problems(run: Json, *, repeated_ids: bool) -> list[str]:
    """Return the problems of a run: lost or doubled spans, missed breaches, too many errors."""
    found = []
    if run["accepted"] != run["evaluated"]:
        found.append(f"accepted {run['accepted']} spans but evaluated {run['evaluated']}")
    if not run["told_accepted"] <= run["accepted"] <= run["told_accepted"] + run["unknown"]:
        found.append(
            f"answered 200 for {run['told_accepted']} spans but counts {run['accepted']} accepted"
        )
    if run["error_rate"] >= MOST_ERRORS:
        found.append(f"{run['error_rate']:.2%} of requests failed: {run['generator']['errors']}")
    if not run["unknown"] and not repeated_ids and run["signals"] != run["breaches_sent"]:
        found.append(f"{run['breaches_sent']} breaches sent, {run['signals']} signals raised")
    wrong = run["generator"]["wrong_sent"] - run["generator"]["wrong_answered"]
    if wrong:
        found.append(f"{wrong} invalid requests were answered with an unexpected status")
    return found


def unstored(stored: Json, runs: Sequence[Json], *, repeated_ids: bool) -> list[str]:
    """Return the problems in the query store after all runs on a service."""
    accepted, signals = (sum(run[key] for run in runs) for key in ("accepted", "signals"))
    found = []
    if not repeated_ids and stored["spans"] != accepted:
        found.append(f"accepted {accepted} spans, the stored traces have {stored['spans']}")
    if not repeated_ids and stored["signals"] != signals:
        found.append(f"{signals} signals raised, {stored['signals']} are stored")
    return found


def measure(options: argparse.Namespace, spans: int) -> tuple[Json, list[str]]:
    """Measure all repeats at one request size, on one service."""
    settings = {"log__ack": options.ack, "traces__idle_seconds": str(options.idle)}
    if options.connections > Ingest.model_fields["max_connections"].default:
        settings["ingest__max_connections"] = str(options.connections)
    settings |= dict(pair.split("=", 1) for pair in options.set)
    runs, over_http, wrong = [], [], []
    payload: Json = {}
    repeated = False
    with service(
        rules=options.rules,
        tenants=options.tenants,
        settings=settings,
        relational=options.relational,
    ) as target:
        urls = {target.ingest: runs}
        if options.grpc:
            urls = {
                target.ingest: over_http,
                target.grpc.replace("http://", "grpc://"): runs,
            }
        for url, those in [*urls.items()] * options.repeats:
            generator = GeneratorProcess(arguments(options, spans, url))
            try:
                payload = generator.payload
                those.append(run_once(target, generator, options))
            finally:
                generator.stop()
            run = those[-1]
            repeated |= options.gzip and run["generator"]["sends_per_body"] > 1
            wrong += [f"{spans} spans a request: {p}" for p in problems(run, repeated_ids=repeated)]
            print(
                f"  {spans} a request, {url}: {run['spans_per_second']:,.0f} spans/s, "
                f"{run['cpu_us_per_span']:.2f} µs CPU a span",
                file=sys.stderr,
            )
        target.stop()
        stored = target.stored()
    all_runs = [*over_http, *runs]
    wrong += [
        f"{spans} spans a request: {p}" for p in unstored(stored, all_runs, repeated_ids=repeated)
    ]
    keys = [key for key, value in runs[0].items() if isinstance(value, int | float)]
    summary = {key: output.spread([run[key] for run in runs], 4) for key in keys}
    percentiles = {
        p: output.spread([run["generator"]["latency_ms"].get(p, 0.0) for run in runs])
        for p in ("p50", "p95", "p99", "max")
    }
    return {
        "payload": payload,
        "summary": summary,
        "latency_ms": percentiles,
        "threads": threads.median([run["threads"] for run in runs]),
        "stored": stored,
        "http_cpu_us_per_span": [run["cpu_us_per_span"] for run in over_http],
        "runs": runs,
    }, wrong


def show(facts: Json, options: argparse.Namespace, rows: dict[int, Json]) -> str:
    """The report as text."""
    tenants = max(1, options.tenants)
    loop = f"{options.rate:,.0f} spans/s offered" if options.rate else "closed loop"
    lines = [
        f"Load, {time.strftime('%Y-%m-%d')}. {output.describe(facts)}.",
        f"Acknowledged when {options.ack}, {options.connections} connections, "
        f"{loop}, {tenants} tenant{'s' if tenants > 1 else ''}, {options.secs:g} s after "
        f"{options.warm_up:g} s of warm-up, {options.repeats} repeats: median (least–greatest). "
        "The generator shares the cores.",
    ]
    lines += [f"Payload: {output.describe_payload(row['payload'])}." for row in rows.values()]
    head = ["", *(f"{spans} spans/request" for spans in rows)]
    body = []
    for title, key, digits in (
        ("spans/s", "spans_per_second", 0),
        ("service CPU, µs a span", "cpu_us_per_span", 2),
        ("the same, until everything is stored", "cpu_us_per_span_to_the_end", 2),
        ("service, cores", "service_cores", 2),
        ("generator, cores", "generator_cores", 2),
        ("generator CPU, µs a span", "generator_us_per_span", 2),
        ("resident memory, MB", "rss_mb", 0),
        ("spans behind when the load ended", "behind_at_end", 0),
    ):
        body.append([title, *(output.shown(r["summary"][key], digits) for r in rows.values())])
    for p in ("p50", "p99", "max"):
        body.append(
            [f"request {p}, ms", *(output.shown(r["latency_ms"][p], 1) for r in rows.values())]
        )
    for title, keys in (
        ("accepted / evaluated", ("accepted", "evaluated")),
        ("breaches sent / signals", ("breaches_sent", "signals")),
    ):
        cells = []
        for row in rows.values():
            sums = [sum(run[key] for run in row["runs"]) for key in keys]
            cells.append(" / ".join(f"{n:,}" for n in sums))
        body.append([title, *cells])
    body.append(["spans of stored traces", *(f"{r['stored']['spans']:,}" for r in rows.values())])
    body.append(
        ["error rate", *(f"{r['summary']['error_rate']['max']:.3%}" for r in rows.values())]
    )
    lines += ["", output.table(head, body)]
    for spans, row in rows.items():
        lines += ["", f"At {spans} spans a request:", "", threads.table(row["threads"])]
    lines += ["", threads.NOTE, "", f"For comparison ({SOURCE}; compare ratios only):", ""]
    own = {spans: row["summary"] for spans, row in rows.items()}

    def cell(spans: int, key: str, digits: int) -> str:
        return f"{own[spans][key]['median']:,.{digits}f}" if spans in own else "–"

    ours = ["**BeTrace, this run** (stores and evaluates)"]
    ours += [cell(spans, "spans_per_second", 0) for spans in (512, 100)]
    ours += [cell(spans, "cpu_us_per_span", 2) for spans in (512, 100)]
    titles = ["", "spans/s at 512", "spans/s at 100", "µs a span at 512", "at 100"]
    lines.append(output.table(titles, [ours, *(GZIP_OTHERS if options.gzip else OTHERS)]))
    reached = {spans: row["spans_per_second"]["median"] >= FLOOR for spans, row in own.items()}
    said = ", ".join(f"{n} a request {'reached' if r else 'MISSED'}" for n, r in reached.items())
    lines += ["", f"Floor of {FLOOR:,} spans/s: {said}."]
    if options.grpc:
        lines += ["", *(against_http(spans, row) for spans, row in rows.items())]
    return "\n".join(lines)


def against_http(spans: int, row: Json) -> str:
    """How much more CPU a span costs over gRPC than over HTTP, in runs that alternate."""
    ratios = [
        run["cpu_us_per_span"] / http
        for run, http in zip(row["runs"], row["http_cpu_us_per_span"], strict=True)
    ]
    spread = output.spread(ratios, 2)
    reached = "reached" if spread["median"] <= GRPC_MOST else "MISSED"
    http = output.spread(row["http_cpu_us_per_span"], 2)
    return (
        f"gRPC against HTTP at {spans} spans a request: {output.shown(spread, 2)} × the CPU of a "
        f"span over HTTP ({output.shown(http, 2)} µs). Floor of {GRPC_MOST:g} ×: {reached}."
    )


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spans", type=int, nargs="+", default=[512, 100], help="spans a request")
    parser.add_argument("--spans-per-trace", type=int, default=10)
    parser.add_argument("--secs", type=float, default=8)
    parser.add_argument("--warm-up", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rules", type=int, default=100)
    parser.add_argument("--relational", action="store_true", help="20 rules relate spans")
    parser.add_argument("--tenants", type=int, default=0, help="0: only the default tenant")
    parser.add_argument("--rate", type=float, default=0, help="spans/s; 0: maximum rate")
    parser.add_argument("--ack", choices=("written", "synced"), default="written")
    parser.add_argument("--gzip", action="store_true")
    parser.add_argument("--json", action="store_true", help="send OTLP JSON")
    parser.add_argument("--grpc", action="store_true", help="send over gRPC and HTTP in turn")
    parser.add_argument("--wrong", type=float, default=0, help="fraction of invalid requests")
    parser.add_argument("--breaches", type=float, default=0.001, help="fraction of traces")
    parser.add_argument("--idle", type=float, default=5, help="seconds after which a trace closes")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION__NAME=VALUE")
    parser.add_argument("--name", default="load", help="name of the JSON file in perf/out")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = parse(given)
    facts = output.machine()
    rows: dict[int, Json] = {}
    wrong: list[str] = []
    for spans in options.spans:
        rows[spans], found = measure(options, spans)
        wrong += found
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    text = show(facts, options, rows)
    print(text)
    values = {"machine": facts, "options": vars(options), "rows": rows, "problems": wrong}
    output.say_saved(options.name, values, text)
    if wrong:
        sys.exit("\n".join(["FAILED:", *wrong]))


if __name__ == "__main__":
    main()
