"""Runs every measurement in sequence, unattended, then writes perf/REPORT.md.

``python -m perf.everything`` takes an hour on an idle machine with two cores. If a step fails or
takes too long, the others still run; failed steps are listed at the end, and the exit code is 1.
``--quick`` tries every step with tiny sizes (a few minutes); its figures are meaningless and go to
a separate directory. ``--baseline`` accepts the regression gate's figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perf.report import output

# step: program, arguments, arguments with --quick, time limit in seconds
STEPS: dict[str, tuple[str, str, str, int]] = {
    "load": ("load", "--secs 6 --repeats 2", "--secs 1 --warm-up 1 --repeats 1 --idle 1", 300),
    "load-tenants": (
        "load",
        "--name load-tenants --tenants 10 --secs 60 --repeats 1",
        "--name load-tenants --tenants 10 --secs 1 --warm-up 1 --repeats 1 --idle 1",
        400,
    ),
    "load-500": (
        "load",
        "--name load-500 --tenants 500 --connections 64 --rules 50 --spans 100 --secs 60 "
        "--warm-up 20 --repeats 1",
        "--name load-500 --tenants 20 --rules 5 --spans 100 --secs 1 --warm-up 1 --repeats 1",
        300,
    ),
    "load-gzip": (
        "load",
        "--name load-gzip --gzip --secs 4 --repeats 1",
        "--name load-gzip --gzip --secs 1 --warm-up 1 --repeats 1 --idle 1",
        200,
    ),
    "load-json": (
        "load",
        "--name load-json --json --secs 4 --repeats 1",
        "--name load-json --json --secs 1 --warm-up 1 --repeats 1 --idle 1",
        200,
    ),
    "load-synced": (
        "load",
        "--name load-synced --ack synced --secs 4 --repeats 1",
        "--name load-synced --ack synced --secs 1 --warm-up 1 --repeats 1 --idle 1",
        200,
    ),
    "bench": ("bench", "", "--only evaluation fallback end_to_end --probes 2", 400),
    "beside": ("beside", "--seconds 4 --rounds 2", "--seconds 1 --rounds 1 --rows ^max", 1500),
    "overload": ("overload", "--secs 60", "--secs 3 --calibrate 2", 300),
    "attacks": ("attacks", "", "--secs 1 --size 0.02", 1500),
    "memory": ("memory", "", "--cycles 20", 500),
    "cachehits": ("cachehits", "--secs 60", "--secs 8 --tenants 10 --users 5 --rules 5", 200),
    "queries": (
        "bench_queries",
        "--repeats 5",
        "--traces 100000 --signals 1000 --repeats 1",
        500,
    ),
    "curves": (
        "curves",
        "--repeats 3 --secs 5",
        "--repeats 1 --most-spans 100 --most-open 1000 --tenants 1 2 --secs 1",
        900,
    ),
    "relations": (
        "relations",
        "",
        "--repeats 1 --most 100 --secs 1",
        900,
    ),
    "soak": ("soak", "", "--secs 5 --warm-up 1 --rate 10000", 600),
    "cluster": (
        "cluster.__main__",
        "edge roles scale times",
        "edge roles times --secs 1 --warm-up 1 --repeats 1 --probes 2 --faults 1 --partitions 2 "
        "--only signal",
        1800,
    ),
    "regress": ("regress", "", "--only decode", 300),
    "flamegraph": ("flamegraph", "", "--secs 2", 120),
    "flamegraph-500": (
        "flamegraph",
        "--name flamegraph-500 --tenants 500 --rules 50 --warm-up 20",
        "--name flamegraph-500 --tenants 20 --rules 5 --secs 2",
        200,
    ),
}


def run(name: str, quick: bool, baseline: bool, environment: dict[str, str]) -> str | None:
    """Run a step; return why it failed, or None."""
    program, arguments, tiny, seconds = STEPS[name]
    given = (tiny if quick else arguments).split()
    if name == "regress" and baseline and not quick:
        given.append("--accept")
    began = time.monotonic()
    print(f"== {name}: python -m perf.{program} {' '.join(given)}", flush=True)
    command = [sys.executable, "-m", f"perf.{program}", *given]
    process = subprocess.Popen(command, cwd=output.ROOT, env=environment)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it stops the service that it started
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return f"took more than {seconds} s"
    print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    if code and quick and _worked(Path(environment["PERF_OUT"], f"{name}.json")):
        print("   floors do not apply to tiny sizes")
        return None
    return f"exit code {code}" if code else None


def _worked(figures: Path) -> bool:
    """Return whether a step wrote its figures and its checks passed."""
    return figures.exists() and not json.loads(figures.read_text()).get("problems")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to check that everything works"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="accept the regression gate's figures"
    )
    options = parser.parse_args(given)
    began = time.monotonic()
    environment = dict(os.environ)
    if options.quick:
        environment["PERF_OUT"] = tempfile.mkdtemp(prefix="betrace-perf-out-")
    failed = {}
    for name in options.only:
        if why := run(name, options.quick, options.baseline, environment):
            failed[name] = why
    summary = [sys.executable, "-m", "perf.summary"]
    if subprocess.run(summary, cwd=output.ROOT, env=environment).returncode:
        failed["summary"] = "see above"
    print(
        f"{(time.monotonic() - began) / 60:.1f} min, results in "
        f"{environment.get('PERF_OUT', Path('perf', 'out'))}"
    )
    if failed:
        sys.exit("FAILED: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main()
