"""Twice the load that the service can take, over real HTTP: does it refuse properly and lose
nothing?

``python -m perf.overload`` measures the rate of a closed loop, then offers twice that rate in an
open loop for a minute, then half of it. Meanwhile it polls the query and admin APIs, and checks
each time that accepted = evaluated + in flight + dead-lettered (+ discarded). Requests that the
generator could not send in time, because all connections were waiting or its core was busy, are
reported separately; a client sees them as latency, which counts from the due time.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from perf.lib.target import GeneratorProcess, Service, service
from perf.report import output

ASKED = {
    "query": "/api/v1/signals?limit=10",
    "admin": "/api/admin/breakers",
    "accounts": "/api/performance/metrics",
}
PAUSE = 0.05  # seconds between polls

Json = dict[str, Any]


@dataclass(slots=True)
class Looks:
    """Polls the service in a thread, and records the results."""

    url: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ASKED})
    failed: list[str] = field(default_factory=list)
    wrong: list[Json] = field(default_factory=list)
    most_in_flight: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Looks:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self._stop.wait(PAUSE):
                for name, path in ASKED.items():
                    started = time.perf_counter()
                    try:
                        answer = client.get(path)
                        answer.raise_for_status()
                    except httpx.HTTPError as error:
                        self.failed.append(f"{name}: {error!r}")
                        continue
                    self.seconds[name].append(time.perf_counter() - started)
                    if name == "accounts":
                        self._check(answer.json())

    def _check(self, now: Json) -> None:
        came = now["spansAccepted"] + now["spansReplayed"] + now["spansCarried"]
        gone = now["spansEvaluated"] + now["spansInFlight"]
        gone += now["spansDeadLettered"] + now["spansDiscarded"]
        self.most_in_flight = max(self.most_in_flight, now["spansInFlight"])
        if came != gone or now["spansInFlight"] < 0:
            self.wrong.append({key: value for key, value in now.items() if key.startswith("spans")})

    def summary(self) -> Json:
        """Return percentiles in milliseconds, by request."""
        return {
            name: {
                "looks": len(found),
                **{f"p{p}": round(1e3 * float(np.percentile(found, p)), 1) for p in (50, 99)},
                "max": round(1e3 * max(found), 1),
            }
            for name, found in self.seconds.items()
            if found
        }


def offer(
    target: Service, options: argparse.Namespace, name: str, rate: float, secs: float
) -> Json:
    """Run one phase of load (0 spans/s: closed loop); return its result and the observations."""
    given = ["--url", f"{target.ingest}/v1/traces", "--spans", str(options.spans)]
    given += [
        "--secs",
        str(secs),
        "--warm-up",
        str(0 if rate else options.warm_up),
        "--rate",
        str(rate),
    ]
    given += ["--connections", str(options.connections), "--rules", str(options.rules)]
    generator = GeneratorProcess(given)
    try:
        with Looks(target.api) as looks:
            generator.start()
            generator.wait_begin()
            cpu = target.cpu_seconds()
            result = generator.wait_end()
            cores = (target.cpu_seconds() - cpu) / result["seconds"]
    finally:
        generator.stop()
    row = {
        "offered": rate,
        "taken": result["spans"] / result["seconds"],
        "refused": result["refused_spans"] / result["seconds"],
        "not_sent": result["late_requests"] * options.spans / result["seconds"],
        "refusals": sum(result["statuses"].get(status, 0) for status in ("429", "503")),
        "with_retry_after": result["retry_after"],
        "other_errors": result["errors"],
        "latency_ms": result["latency_ms"],
        "least_taken_in_a_second": min(result["per_second"], default=0),
        "service_cores": cores,
        "rss_mb": target.rss() / 1e6,
        "most_in_flight": looks.most_in_flight,
        "asked": looks.summary(),
        "failed_looks": looks.failed[:10],
        "wrong_accounts": looks.wrong[:10],
        "generator": result,
    }
    print(
        f"  {name}: {row['taken']:,.0f} spans/s taken, {row['refused']:,.0f} refused",
        file=sys.stderr,
    )
    return row


def measure(options: argparse.Namespace) -> Json:
    """Run all three phases on one service; return their results and the final counts."""
    rows: dict[str, Json] = {}
    settings = {"traces__idle_seconds": str(options.idle)}
    with service(rules=options.rules, settings=settings) as target:
        rows["closed loop"] = offer(target, options, "closed loop", 0, options.calibrate)
        target.settle(options.idle)
        takes = rows["closed loop"]["taken"]
        rows["twice that"] = offer(target, options, "twice", options.times * takes, options.secs)
        half = min(takes, rows["twice that"]["taken"]) / 2
        rows["half, at once after"] = offer(target, options, "half", half, options.after)
        end = target.settle(options.idle)
    told, unknown, breaches = (
        sum(row["generator"][key] for row in rows.values())
        for key in ("all_spans", "all_unknown_spans", "all_breaches")
    )
    return {
        "rows": rows,
        "told_accepted": told,
        "unknown": unknown,
        "accepted": end["spansAccepted"],
        "evaluated": end["spansEvaluated"],
        "breaches_sent": breaches,
        "signals": end["signalsRaised"],
    }


def problems(found: Json) -> list[str]:
    """Return the failed checks."""
    wrong = []
    for name, row in found["rows"].items():
        if row["wrong_accounts"]:
            wrong.append(f"{name}: accounts that do not add up: {row['wrong_accounts'][0]}")
        if row["failed_looks"]:
            wrong.append(f"{name}: queries failed: {row['failed_looks'][0]}")
        if row["with_retry_after"] != row["refusals"]:
            wrong.append(
                f"{name}: {row['refusals']} refusals, {row['with_retry_after']} with Retry-After"
            )
        if row["other_errors"]:
            wrong.append(f"{name}: requests failed: {row['other_errors']}")
    if not found["rows"]["twice that"]["refusals"]:
        wrong.append("nothing was refused: the generator could not exceed the service's rate")
    after = found["rows"]["half, at once after"]
    took = after["generator"]["per_second"][1:]
    if sum(took) < 0.95 * after["offered"] * len(took):
        wrong.append(f"a second after the overload it took {sum(took) / len(took):,.0f} spans/s")
    if found["accepted"] != found["evaluated"]:
        wrong.append(f"accepted {found['accepted']} spans but evaluated {found['evaluated']}")
    if not 0 <= found["accepted"] - found["told_accepted"] <= found["unknown"]:
        wrong.append(f"answered 200 for {found['told_accepted']}, accepted {found['accepted']}")
    if not found["unknown"] and found["signals"] != found["breaches_sent"]:
        wrong.append(f"{found['breaches_sent']} breaches sent, {found['signals']} signals raised")
    return wrong


def show(facts: Json, options: argparse.Namespace, found: Json) -> str:
    """The report as text."""
    rows = found["rows"]
    body: list[list[str]] = []

    def add(title: str, *values: str) -> None:
        body.append([title, *values])

    of = list(rows.values())
    add("offered, spans/s", *(f"{r['offered']:,.0f}" if r["offered"] else "–" for r in of))
    add("taken, spans/s", *(f"{r['taken']:,.0f}" for r in of))
    add("least taken in a second", *(f"{r['least_taken_in_a_second']:,}" for r in of))
    add("refused, spans/s", *(f"{r['refused']:,.0f}" for r in of))
    add("not sent in time, spans/s", *(f"{r['not_sent']:,.0f}" for r in of))
    add(
        "refusals / with Retry-After",
        *(f"{r['refusals']:,} / {r['with_retry_after']:,}" for r in of),
    )
    for p in ("p50", "p99"):
        add(f"accepted request {p}, ms", *(f"{r['latency_ms'].get(p, 0):,.0f}" for r in of))
    for name in ASKED:
        values = [r["asked"].get(name) for r in of]
        add(
            f"{name} p50 / p99 / max, ms",
            *(f"{v['p50']:g} / {v['p99']:g} / {v['max']:g}" if v else "–" for v in values),
        )
    add("checks of the counts", *(f"{r['asked']['accounts']['looks']:,}" for r in of))
    add("most spans in flight", *(f"{r['most_in_flight']:,}" for r in of))
    add("service, cores", *(f"{r['service_cores']:.2f}" for r in of))
    add("resident memory, MB", *(f"{r['rss_mb']:,.0f}" for r in of))
    lines = [
        f"Overload, {time.strftime('%Y-%m-%d')}. {output.describe(facts)}.",
        f"{options.spans} spans a request, {options.rules} rules, {options.times:g} times the rate "
        f"of a closed loop for {options.secs:g} s. The generator shares the cores.",
        "",
        output.table(["", *rows], body),
        "",
        f"Answered with 200: {found['told_accepted']:,} spans; accepted {found['accepted']:,}, "
        f"evaluated {found['evaluated']:,}. Breaches sent {found['breaches_sent']:,}, signals "
        f"{found['signals']:,}.",
    ]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spans", type=int, default=100, help="spans a request")
    parser.add_argument("--secs", type=float, default=60)
    parser.add_argument("--calibrate", type=float, default=8, help="seconds of the closed loop")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds before it")
    parser.add_argument("--after", type=float, default=5, help="seconds of half the load")
    parser.add_argument("--idle", type=float, default=5, help="seconds after which a trace closes")
    parser.add_argument("--times", type=float, default=2, help="multiple of the closed loop's rate")
    parser.add_argument(
        "--connections", type=int, default=64, help="connections that offer the load"
    )
    parser.add_argument("--rules", type=int, default=100)
    parser.add_argument("--name", default="overload", help="name of the JSON file in perf/out")
    options = parser.parse_args(given)
    facts = output.machine()
    found = measure(options)
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    text, wrong = show(facts, options, found), problems(found)
    print(text)
    values = {"machine": facts, "options": vars(options), **found, "problems": wrong}
    output.say_saved(options.name, values, text)
    if wrong:
        sys.exit("\n".join(["FAILED:", *wrong]))


if __name__ == "__main__":
    main()
