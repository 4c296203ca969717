"""Compare the OTLP JSON kernel with the reference decoder on many generated bodies.

``python -m perf.fuzz_json --cases 100000 [--first SEED]``. On a difference it prints the case's
seed and bytes.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.support.json_cases import case
from tests.support.json_compare import check


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    options = parser.parse_args(given)
    began = time.monotonic()
    accepted = size = 0
    for seed in range(options.first, options.first + options.cases):
        body = case(seed)
        size += len(body)
        try:
            accepted += check(body)
        except Exception:
            print(f"case {seed} differs, {len(body)} bytes: {body!r}", file=sys.stderr)
            raise
    took = time.monotonic() - began
    print(
        f"{options.cases} cases ({size / 1e6:.0f} MB), {accepted} accepted by both, "
        f"{options.cases - accepted} refused by both, no difference, {took:.0f} s"
    )


if __name__ == "__main__":
    main()
