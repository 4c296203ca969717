"""A steady load for minutes: is the last minute like the first?

``python -m perf.soak`` offers 50 000 spans/s in an open loop for 5 minutes, and compares rate, CPU
a span, p99 of a request and mean resident memory of the last slice with the first. The warm-up is
longer than DuckDB's rows wait for a checkpoint. It also polls the channels: the mean content of a
channel divided by its throughput is the mean time of an item in it, processing included (Little's
law). At the end it stops the service and counts the rows in its query store. It draws
docs/perf/soak-*.svg.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from perf import load
from perf.lib import threads
from perf.lib.target import GeneratorProcess, Service, service
from perf.load import run_once
from perf.report import output
from perf.report.charts import Series, chart

WITHIN = 0.1  # allowed difference of the last slice from the first
LOOK_SECONDS = (
    0.5  # mean time between polls; random, to avoid synchronising with the service's timers
)

Json = dict[str, Any]


@dataclass(slots=True)
class Watch:
    """Records the service's resource use and the content of its channels during the load."""

    target: Service
    slice: float
    cpu: list[float] = field(default_factory=list)  # seconds, at the ends of slices
    sizes: dict[str, list[int]] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)  # units a second
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since then, RSS

    def __call__(self, seconds: float) -> None:
        """Poll for ``seconds``."""
        began = time.monotonic()
        before = self.target.metrics()["stages"]
        self._note()
        next_slice = self.slice
        while (gone := time.monotonic() - began) < seconds:
            pause = random.uniform(0.5, 1.5) * LOOK_SECONDS
            time.sleep(max(0.0, min(pause, next_slice - gone, seconds - gone)))
            for queue in self.target.get("/api/performance/queue-stats")["queues"]:
                self.sizes.setdefault(queue["name"], []).append(queue["currentSize"])
            self.memory.append((time.monotonic() - began, self.target.rss()))
            if time.monotonic() - began >= next_slice:
                self._note()
                next_slice += self.slice
        if len(self.cpu) < round(seconds / self.slice) + 1:
            self._note()
        gone = time.monotonic() - began
        after = self.target.metrics()["stages"]
        for name, stage in after.items():
            self.done[name] = (stage["unitsOut"] - before[name]["unitsOut"]) / gone

    def _note(self) -> None:
        self.cpu.append(self.target.cpu_seconds())

    def rss(self) -> list[int]:
        """Return all readings of resident memory in bytes."""
        return [rss for _, rss in self.memory]

    def queueing_ms(self) -> dict[str, float]:
        """Return the mean time of an item in each channel, in milliseconds."""
        return {
            name: round(1000 * statistics.mean(sizes) / self.done[name], 2)
            for name, sizes in self.sizes.items()
            if self.done.get(name)
        }


def slices(run: Json, watch: Watch) -> list[Json]:
    """Return the figures of each slice."""
    generated = run["generator"]
    found = []
    for number, part in enumerate(generated["slices"]):
        began = number * watch.slice
        rss = [rss for at, rss in watch.memory if began < at <= began + watch.slice]
        if number + 1 >= len(watch.cpu):
            break
        spans = part["requests"] * generated["spans"] / max(1, generated["requests"])
        used = watch.cpu[number + 1] - watch.cpu[number]
        found.append(
            {
                "spans_per_second": round(spans / part["seconds"]),
                "cpu_us_per_span": round(1e6 * used / max(1.0, spans), 3),
                "p50_ms": part.get("p50", 0.0),
                "p99_ms": part.get("p99", 0.0),
                "rss_mb": round(statistics.mean(rss or watch.rss()) / 1e6, 1),
            }
        )
    return found


def judge(parts: list[Json]) -> Json:
    """Return the last slice's figures as ratios to the first, and whether they are allowed. Higher
    throughput, and lower values of anything else, are always allowed."""
    first, last = parts[0], parts[-1]
    ratios = {key: round(last[key] / first[key], 3) if first[key] else 1.0 for key in first}
    good = {
        key: ratio >= 1 - WITHIN if key == "spans_per_second" else ratio <= 1 + WITHIN
        for key, ratio in ratios.items()
    }
    return {"ratio": ratios, "good": good}


def measure(options: argparse.Namespace) -> tuple[Json, list[str]]:
    """Run; return the results with slices, and the failed checks."""
    settings = {"traces__idle_seconds": str(options.idle)}
    with service(rules=options.rules, tenants=options.tenants, settings=settings) as target:
        watch = Watch(target, options.slice)
        given = load.arguments(options, options.spans, target.ingest)
        generator = GeneratorProcess([*given, "--slice", str(options.slice)])
        try:
            payload = generator.payload
            run = run_once(target, generator, options, watch)
        finally:
            generator.stop()
        target.stop()
        stored = target.stored()
    parts = slices(run, watch)
    found = {
        "payload": payload,
        "slices": parts,
        "judged": judge(parts),
        "queueing_ms": watch.queueing_ms(),
        "stored": stored,
        "memory": [[round(at, 1), round(rss / 1e6, 1)] for at, rss in watch.memory],
        "run": run,
    }
    wrong = load.problems(run, repeated_ids=False)
    return found, wrong + load.unstored(stored, [run], repeated_ids=False)


def draw(found: Json) -> None:
    """Draw the pictures in docs/perf: accepted spans/s and resident memory over time."""
    rates = enumerate(found["run"]["generator"]["per_second"])
    lines = {
        "rate": ("spans/s", [(second + 0.5, float(spans)) for second, spans in rates]),
        "memory": ("resident memory, MB", [(at, mb) for at, mb in found["memory"]]),
    }
    output.PICTURES.mkdir(parents=True, exist_ok=True)
    for name, (unit, points) in lines.items():
        line = Series(unit, [(x, y, y, y) for x, y in points])
        picture = chart(f"Soak: {unit}", "seconds", unit, [line], linear=True)
        (output.PICTURES / f"soak-{name}.svg").write_text(picture)


def show(facts: Json, options: argparse.Namespace, found: Json, wrong: list[str]) -> str:
    """The report as text."""
    run, judged = found["run"], found["judged"]
    titles = {
        "spans_per_second": ("spans/s", 0),
        "cpu_us_per_span": ("CPU, µs a span", 2),
        "p50_ms": ("p50, ms", 1),
        "p99_ms": ("p99, ms", 1),
        "rss_mb": ("RSS, mean, MB", 0),
    }
    rows = [
        [f"{number + 1}", *(f"{part[key]:,.{digits}f}" for key, (_, digits) in titles.items())]
        for number, part in enumerate(found["slices"])
    ]
    rows.append(["last ÷ first", *(f"{judged['ratio'][key]:.2f}" for key in titles)])
    rows.append(["within 10 %", *("yes" if judged["good"][key] else "**no**" for key in titles)])
    stored = found["stored"]
    counts = [
        ("spans answered with 200", f"{run['told_accepted']:,}"),
        ("spans accepted", f"{run['accepted']:,}"),
        ("spans evaluated", f"{run['evaluated']:,}"),
        ("spans of the stored traces", f"{stored['spans']:,}"),
        ("breaches sent", f"{run['breaches_sent']:,}"),
        ("signals raised", f"{run['signals']:,}"),
        ("signals stored", f"{stored['signals']:,}"),
        ("error rate", f"{run['error_rate']:.3%}"),
    ]
    queueing = [(name, f"{ms:.2f}") for name, ms in found["queueing_ms"].items()]
    return "\n".join(
        [
            f"Soak. {output.describe(facts)}.",
            f"{options.rate:,.0f} spans/s offered in an open loop for {options.secs:g} s after "
            f"{options.warm_up:g} s of warm-up, {options.tenants} tenants, "
            f"{options.connections} connections; "
            f"the generator shares the cores and used {run['generator_cores']:.2f} of one, the "
            f"service {run['service_cores']:.2f}.",
            f"Payload: {output.describe_payload(found['payload'])}.",
            "",
            output.table(
                [f"slice of {options.slice:g} s", *(title for title, _ in titles.values())], rows
            ),
            "",
            output.table(["counted from the warm-up to the end", ""], counts),
            "",
            output.table(["channel", "mean time in it, processing included, ms"], queueing),
            "",
            "Rows wait in the projection channel on purpose, to be committed together.",
            "",
            threads.table(run["threads"]),
            "",
            threads.NOTE,
            "",
            f"Checks failed: {'; '.join(wrong)}." if wrong else "All checks held.",
        ]
    )


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Return the options. Options of :mod:`perf.load` that the run needs have fixed values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--secs", type=float, default=300)
    parser.add_argument("--slice", type=float, default=60, help="seconds compared with each other")
    parser.add_argument("--rate", type=float, default=50_000, help="spans/s")
    parser.add_argument("--spans", type=int, default=100, help="spans a request")
    parser.add_argument("--warm-up", type=float, default=90)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--rules", type=int, default=100)
    parser.add_argument("--tenants", type=int, default=10)
    parser.add_argument("--idle", type=float, default=5, help="seconds after which a trace closes")
    options = parser.parse_args(given)
    if options.secs < 2 * options.slice:
        options.slice = options.secs / 5
    vars(options).update(spans_per_trace=10, wrong=0.0, breaches=0.001, gzip=False, json=False)
    return options


def main(given: list[str] | None = None) -> None:
    options = parse(given)
    facts = output.machine()
    found, wrong = measure(options)
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    draw(found)
    text = show(facts, options, found, wrong)
    print(text)
    values = {"machine": facts, "options": vars(options), **found, "problems": wrong}
    output.say_saved("soak", values, text)
    worse = [key for key, good in found["judged"]["good"].items() if not good]
    if worse:
        wrong.append(f"the last slice is not within {WITHIN:.0%} of the first: {', '.join(worse)}")
    if wrong:
        sys.exit("\n".join(["FAILED:", *wrong]))


if __name__ == "__main__":
    main()
