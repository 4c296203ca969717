"""BeTrace beside Rotel and a bare HTTP server: CPU a span, spans a second and latency.

``python -m perf.beside`` sends the same load to the three in turns (A, B, C, A, B, C, …), so that
the machine's noise falls on all of them, and compares medians. BeTrace evaluates 100 rules and
stores everything; Rotel decodes the spans and drops them; bare HTTP is uvicorn with httptools,
which reads the body and answers 200. A rate is sent as 10 tenants.

CPU is counted from the first request, warm-up included, until everything is stored.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from perf import load
from perf.lib import others
from perf.lib.target import GeneratorProcess, Service, service
from perf.report import output

OURS, ROTEL, BARE = "BeTrace", "Rotel", "bare HTTP"
RULES = 100
TENANTS = 10  # where a rate is given
WARM_UP = 2.0  # seconds
IDLE_SECONDS = 2.0  # after which a trace closes

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A load: ``spans`` a request, ``rate`` in spans/s (0: as fast as the server takes them)."""

    spans: int
    rate: int = 0
    gzip: bool = False
    json: bool = False

    @property
    def name(self) -> str:
        """What ``--rows`` matches."""
        rate = f"{self.rate} spans/s" if self.rate else "maximum rate"
        return f"{rate}, {self.spans}{' gzip' * self.gzip}{' JSON' * self.json}"


ROWS = (
    Row(512),
    Row(100),
    Row(512, gzip=True),
    Row(100, json=True),
    Row(512, 50_000),
    Row(100, 50_000),
    Row(20, 50_000),
    Row(100, 10_000),
    Row(100, 10_000, json=True),
    Row(20, 1_000),
)


def load_options(row: Row, seconds: float) -> argparse.Namespace:
    """The options of :mod:`perf.load` that describe a row's load."""
    given = ["--secs", str(seconds), "--warm-up", str(WARM_UP), "--rules", str(RULES)]
    given += ["--idle", str(IDLE_SECONDS), "--rate", str(row.rate)]
    given += ["--tenants", str(TENANTS if row.rate else 0)]
    return load.parse(given + ["--gzip"] * row.gzip + ["--json"] * row.json)


def run_other(server: others.Other, generator: GeneratorProcess, seconds: float) -> Json:
    """One measurement of a server that stores nothing; the keys of `perf.load.run_once`."""
    before = server.cpu_seconds()
    generator.start()
    generator.wait_begin()
    cpu = server.cpu_seconds()
    time.sleep(seconds)
    in_window, rss = server.cpu_seconds() - cpu, server.rss()
    result = generator.wait_end()
    used = server.cpu_seconds() - before
    requests = result["requests"] + sum(result["errors"].values())
    return {
        "spans_per_second": result["spans"] / result["seconds"],
        "cpu_us_per_span": 1e6 * in_window / max(1, result["spans"]),
        "cpu_us_per_span_to_the_end": 1e6 * used / max(1, result["all_spans"]),
        "error_rate": sum(result["errors"].values()) / max(1, requests),
        "rss_mb": rss / 1e6,
        "generator": result,
    }


def measure(row: Row, seconds: float, rounds: int) -> Json:
    """All rounds of a row, on servers started for it: by server its runs and their medians."""
    options = load_options(row, seconds)
    settings = {"traces__idle_seconds": str(IDLE_SECONDS)}
    runs: dict[str, list[Json]] = {OURS: [], ROTEL: [], BARE: []}
    problems: list[str] = []
    payload: Json = {}
    with ExitStack() as stack:
        ours = stack.enter_context(service(rules=RULES, tenants=options.tenants, settings=settings))
        rotel = stack.enter_context(others.rotel())
        bare = stack.enter_context(others.bare_http())
        turns: tuple[tuple[str, str, Callable[[GeneratorProcess], Json]], ...] = (
            (OURS, ours.ingest, lambda g: load.run_once(ours, g, options)),
            (ROTEL, rotel.url, lambda g: run_other(rotel, g, seconds)),
            (BARE, bare.url, lambda g: run_other(bare, g, seconds)),
        )
        for _ in range(rounds):
            for name, url, run in turns:
                generator = GeneratorProcess(load.arguments(options, row.spans, url))
                try:
                    payload = generator.payload
                    found = run(generator)
                finally:
                    generator.stop()
                runs[name].append(found)
                problems += _problems(row, name, found)
                print(
                    f"  {row.name}, {name}: {found['spans_per_second']:,.0f} spans/s, "
                    f"{found['cpu_us_per_span_to_the_end']:.2f} µs CPU a span",
                    file=sys.stderr,
                )
        problems += _unstored(ours, runs[OURS])
    return {
        "payload": payload,
        "servers": {name: summarise(found) for name, found in runs.items()},
        "runs": runs,
        "problems": problems,
    }


def _problems(row: Row, name: str, run: Json) -> list[str]:
    if name == OURS:
        repeated = row.gzip and run["generator"]["sends_per_body"] > 1
        found = load.problems(run, repeated_ids=repeated)
    elif run["error_rate"] >= load.MOST_ERRORS:
        found = [f"{run['error_rate']:.2%} of requests failed: {run['generator']['errors']}"]
    else:
        found = []
    return [f"{row.name}, {name}: {problem}" for problem in found]


def _unstored(ours: Service, runs: Sequence[Json]) -> list[str]:
    ours.stop()
    repeated = any(run["generator"]["sends_per_body"] > 1 for run in runs)
    return load.unstored(ours.stored(), runs, repeated_ids=repeated)


def summarise(runs: Sequence[Json]) -> Json:
    """The spread of each figure over the rounds."""
    keys = ("spans_per_second", "cpu_us_per_span", "cpu_us_per_span_to_the_end", "rss_mb")
    found: Json = {key: output.spread([run[key] for run in runs], 4) for key in keys}
    for quantile in ("p50", "p99"):
        found[f"{quantile}_ms"] = output.spread(
            [run["generator"]["latency_ms"].get(quantile, 0.0) for run in runs]
        )
    return found


def show(facts: Json, options: argparse.Namespace, rows: dict[str, Json]) -> str:
    """The report as text."""
    head = ["load", "server", "CPU, µs a span", "÷ Rotel", "CPU while the load runs"]
    head += ["spans/s", "p50, ms", "p99, ms"]
    body = []
    for name, row in rows.items():
        rotel = row["servers"][ROTEL]["cpu_us_per_span_to_the_end"]["median"]
        for server, found in row["servers"].items():
            cpu = found["cpu_us_per_span_to_the_end"]
            body.append(
                [
                    name if server == OURS else "",
                    server,
                    output.shown(cpu),
                    f"{cpu['median'] / rotel:.2f}" if rotel else "–",
                    output.shown(found["cpu_us_per_span"]),
                    output.shown(found["spans_per_second"], 0),
                    output.shown(found["p50_ms"], 1),
                    output.shown(found["p99_ms"], 1),
                ]
            )
    return "\n".join(
        [
            f"{output.describe(facts)}.",
            f"8 connections, {options.seconds:g} s after {WARM_UP:g} s of warm-up, "
            f"{options.rounds} rounds in turns: median (min–max). The load generator shares the "
            f"cores. BeTrace evaluates {RULES} rules and stores everything, acknowledged when "
            "written; Rotel decodes the spans and drops them; bare HTTP (uvicorn with httptools) "
            f"reads the body and answers 200. Where a rate is given, {TENANTS} tenants send it. "
            "CPU is counted from the first request until everything is stored, warm-up included.",
            "",
            "The number after the rate is spans a request.",
            "",
            output.table(head, body),
            *_repeats(rows),
        ]
    )


def _repeats(rows: dict[str, Json]) -> Iterator[str]:
    """Name the rows whose compressed bodies were sent more than once: repeated spans cost less."""
    for name, row in rows.items():
        sends = [run["generator"]["sends_per_body"] for run in row["runs"][OURS]]
        if row["payload"]["gzip"] and max(sends) > 1:
            yield ""
            yield f"{name}: BeTrace got bodies up to {max(sends)} times; repeated spans cost less."


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rows", default="", metavar="PATTERN", help="only rows whose name matches this regex"
    )
    options = parser.parse_args(given)
    options.chosen = [row for row in ROWS if re.search(options.rows, row.name)]
    if not options.chosen:
        names = "; ".join(row.name for row in ROWS)
        parser.error(f"no row matches {options.rows!r}; the rows are: {names}")
    return options


def main(given: list[str] | None = None) -> None:
    options = parse(given)
    facts = output.machine()
    rows = {row.name: measure(row, options.seconds, options.rounds) for row in options.chosen}
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    problems = [problem for row in rows.values() for problem in row["problems"]]
    text = show(facts, options, rows)
    print(text)
    values = {
        "machine": facts,
        "options": {key: vars(options)[key] for key in ("seconds", "rounds", "rows")},
        "rows": rows,
        "problems": problems,
    }
    output.say_saved("beside", values, text)
    if problems:
        sys.exit("\n".join(["FAILED:", *problems]))


if __name__ == "__main__":
    main()
