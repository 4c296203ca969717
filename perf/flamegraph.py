"""A flame graph of the service under load.

``python -m perf.flamegraph`` writes perf/out/flamegraph.svg: py-spy samples the service while the
generator sends to it; threads that wait are left out. Sampling another process needs the right to
trace it (root, or ptrace_scope 0).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from perf import report
from perf.target import GeneratorProcess, service


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spans", type=int, default=100, help="a request")
    parser.add_argument("--secs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0, help="spans/s; 0: as fast as it goes")
    parser.add_argument("--tenants", type=int, default=0)
    parser.add_argument("--gil", action="store_true", help="only samples that hold the GIL")
    parser.add_argument("--native", action="store_true", help="frames of C as well")
    options = parser.parse_args(given)
    report.OUT.mkdir(exist_ok=True)
    picture = report.OUT / "flamegraph.svg"
    with service(tenants=options.tenants) as target:
        generator = GeneratorProcess(
            [
                f"--url={target.ingest}/v1/traces",
                f"--spans={options.spans}",
                f"--secs={options.secs + 1}",
                "--warm-up=3",
                f"--rate={options.rate}",
                f"--tenants={options.tenants}",
            ]
        )
        try:
            generator.start()
            generator.wait_begin()
            sampler = [str(Path(sys.executable).with_name("py-spy")), "record"]
            sampler += ["--pid", str(target.process.pid), "--duration", str(options.secs)]
            sampler += ["--rate", "200", "--threads", "--output", str(picture)]
            sampler += ["--gil"] * options.gil + ["--native"] * options.native
            done = subprocess.run(sampler, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"py-spy could not sample the service: {done.stderr.strip()}")
            result = generator.wait_end()
        finally:
            generator.stop()
    rate = result["spans"] / result["seconds"]
    print(f"{picture}, {rate:,.0f} spans/s while it was sampled")


if __name__ == "__main__":
    main()
