"""The long run of relational rules: ``python -m tests.long_run --examples 10000``.

It compares the engine with the naive reading, as ``tests/service/traces/test_relational.py`` does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from betrace.service.storage.spanlog.log import SpanLog
from tests.support.relational_arrivals import ARRIVALS, check_arrivals


def run(examples: int) -> int:
    """Check so many examples; returns how many rules and traces they had together."""
    pairs = 0
    with tempfile.TemporaryDirectory() as directory, SpanLog(Path(directory)) as log:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink a difference takes long
            suppress_health_check=list(HealthCheck),
        )
        @given(**ARRIVALS)
        def check(rules: Any, traces: Any, seed: int, between: Any) -> None:
            nonlocal pairs
            check_arrivals(log, rules, traces, seed, between)
            pairs += len(rules) * len(traces)
            if pairs % 1000 < 6:
                print(f"{pairs:,} rules on traces", file=sys.stderr)

        check()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    options = parser.parse_args()
    began = time.monotonic()
    pairs = run(options.examples)
    seconds = time.monotonic() - began
    print(
        f"{options.examples:,} examples, {pairs:,} rules on traces, no difference, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
