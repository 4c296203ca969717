"""A flame graph of the service under load, and its functions by CPU.

``python -m perf.flamegraph`` writes perf/out/flamegraph.svg: py-spy samples the service under load,
without waiting threads. Then it samples again and prints the functions with the most samples.
Sampling needs permission to trace another process (root, or ptrace_scope 0), and slows it down:
read the shares, not the rate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from perf.lib import stacks, threads
from perf.lib.target import GeneratorProcess, Service, service
from perf.report import output

SAMPLES = 200  # a second
LONGEST = 600  # seconds of load at most; it ends with the sampling

Json = dict[str, Any]


def sample(target: Service, options: argparse.Namespace, form: str, path: Path) -> None:
    """Sample the service into a file. Exits if that is not permitted."""
    sampler = [str(Path(sys.executable).with_name("py-spy")), "record"]
    sampler += ["--pid", str(target.process.pid), "--duration", str(options.secs)]
    sampler += ["--rate", str(SAMPLES), "--threads", "--format", form, "--output", str(path)]
    sampler += ["--gil"] * options.gil + ["--native"] * options.native
    done = subprocess.run(sampler, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"py-spy could not sample the service: {done.stderr.strip()}")


def measure(options: argparse.Namespace, picture: Path) -> Json:
    """Sample twice: for the picture, and for the functions."""
    with (
        service(rules=options.rules, tenants=options.tenants) as target,
        tempfile.TemporaryDirectory() as directory,
    ):
        generator = GeneratorProcess(
            [
                f"--url={target.ingest}/v1/traces",
                f"--spans={options.spans}",
                f"--secs={LONGEST}",
                f"--warm-up={options.warm_up}",
                f"--rate={options.rate}",
                f"--tenants={options.tenants}",
                f"--rules={options.rules}",
            ]
        )
        try:
            generator.start()
            generator.wait_begin()
            sample(target, options, "flamegraph", picture)
            raw = Path(directory) / "raw"
            before, cpu, began = target.threads(), target.cpu_seconds(), time.monotonic()
            accepted = target.metrics()["spansAccepted"]
            sample(target, options, "raw", raw)
            cpu, seconds = target.cpu_seconds() - cpu, time.monotonic() - began
            used = threads.between(before, target.threads(), seconds, 0, cpu)
            accepted = target.metrics()["spansAccepted"] - accepted
            shares = {name: each["share"] for name, each in used.items()}
            found = stacks.functions(raw.read_text(), shares)
        finally:
            generator.stop()
    return {
        "payload": generator.payload,
        "spans_per_second": round(accepted / seconds),
        "threads": used,
        **found,
    }


def show(facts: Json, options: argparse.Namespace, found: Json) -> str:
    """The report as text."""
    among = ", ".join(
        f"{name} {each['share']:.0%}"
        for name, each in found["threads"].items()
        if each["share"] >= threads.LEAST_SHARE
    )
    return "\n".join(
        [
            f"Functions. {output.describe(facts)}.",
            f"py-spy, {found['samples']:,} samples in {options.secs} s, at "
            f"{found['spans_per_second']:,} spans/s while sampling; {max(1, options.tenants)} "
            f"tenant{'s' if options.tenants > 1 else ''}. Shares of the service's CPU: each "
            "thread's share is from the system, distributed over its functions by samples. "
            "Kernels, C libraries and waits for the GIL count for the function that calls them.",
            f"Payload: {output.describe_payload(found['payload'])}.",
            "",
            f"Threads: {among}.",
            "",
            stacks.table(found),
        ]
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spans", type=int, default=100, help="spans a request")
    parser.add_argument("--secs", type=int, default=10, help="seconds of each of the two samplings")
    parser.add_argument("--warm-up", type=float, default=3)
    parser.add_argument("--rate", type=float, default=0, help="spans/s; 0: maximum rate")
    parser.add_argument("--tenants", type=int, default=0)
    parser.add_argument("--rules", type=int, default=100, help="rules of a tenant")
    parser.add_argument("--gil", action="store_true", help="only samples of threads with the GIL")
    parser.add_argument("--native", action="store_true", help="include C frames")
    parser.add_argument("--name", default="flamegraph", help="name of the files in perf/out")
    options = parser.parse_args(given)
    facts = output.machine()
    output.OUT.mkdir(exist_ok=True)
    picture = output.OUT / f"{options.name}.svg"
    found = measure(options, picture)
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    text = show(facts, options, found)
    print(text)
    output.say_saved(options.name, {"machine": facts, "options": vars(options), **found}, text)
    print(os.path.relpath(picture, output.ROOT))


if __name__ == "__main__":
    main()
