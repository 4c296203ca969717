"""Compares the protobuf scanner with the protobuf library on many generated requests.

``python -m perf.fuzz_wire --cases 100000 [--first SEED]`` checks each body alone, then together
with others, then as the library writes it. If there is a difference, it prints the seed and the
bytes.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.support import otlp_reference as reference
from tests.support.otlp_generator import case

COMPANY = 5  # bodies scanned together


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    options = parser.parse_args(given)
    began = time.monotonic()
    accepted = size = 0
    company: list[bytes] = []
    for seed in range(options.first, options.first + options.cases):
        body = case(seed)
        size += len(body)
        try:
            if reference.check([body]):
                accepted += 1
                canonical = reference.parse(body).SerializeToString()
                assert reference.check([canonical], strict=True) == 1
            company.append(body)
            if len(company) == COMPANY:
                reference.check(company)
                company.clear()
        except Exception:
            print(f"case {seed} differs, {len(body)} bytes: {body.hex()}", file=sys.stderr)
            raise
    took = time.monotonic() - began
    print(
        f"{options.cases} cases ({size / 1e6:.0f} MB), {accepted} accepted by both, "
        f"{options.cases - accepted} refused by both, no differences, {took:.0f} s"
    )


if __name__ == "__main__":
    main()
