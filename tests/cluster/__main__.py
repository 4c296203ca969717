"""The long run: ``python -m tests.cluster --faults 500``.

Faults come in campaigns, each on a fresh cluster and compared with the oracle at its end. The first
difference ends the run and keeps the data for inspection.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.cluster.campaign import run_faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--faults-per-campaign", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--directory", type=Path, help="where the data goes (default: a temporary directory)"
    )
    given = parser.parse_args()
    root = given.directory or Path(tempfile.mkdtemp(prefix="betrace-cluster-"))
    done, seed = 0, given.seed
    total: Counter[str] = Counter()
    while done < given.faults:
        faults = min(given.faults_per_campaign, given.faults - done)
        directory = root / f"seed-{seed}"
        began = time.monotonic()
        try:
            campaign = run_faults(
                directory, faults, seed, lambda text: print("  " + text, flush=True)
            )
        except AssertionError as error:
            print(f"FAILED with --seed {seed}, data in {directory}: {error}")
            return 1
        done += faults
        total += campaign.faults.counts
        print(
            f"{done} faults, {len(campaign.traces.made)} traces, "
            f"{campaign.clients.acknowledged} spans acknowledged, "
            f"answers {dict(campaign.clients.statuses)}, "
            f"{len(campaign.traces.active())} signals active as expected, "
            f"{campaign.rules.made} rule changes, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        shutil.rmtree(directory)
        seed += 1
    print(f"0 lost, 0 false, 0 doubled after {dict(total)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
