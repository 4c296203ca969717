"""The long run: ``python -m tests.crash --kills 50``.

Kills come in campaigns, each on fresh data and compared with the oracle at its end. The first
difference ends the run and keeps the data for inspection.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.crash.campaign import run_kills


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-per-campaign", type=int, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--directory", type=Path, help="where the data goes (default: a temporary directory)"
    )
    given = parser.parse_args()
    root = given.directory or Path(tempfile.mkdtemp(prefix="betrace-crash-"))
    done, seed = 0, given.seed
    while done < given.kills:
        kills = min(given.kills_per_campaign, given.kills - done)
        directory = root / f"seed-{seed}"
        began = time.monotonic()
        try:
            campaign = run_kills(
                directory, kills, seed, lambda text: print("  " + text, flush=True)
            )
        except AssertionError as error:
            print(f"FAILED with --seed {seed}, data in {directory}: {error}")
            return 1
        done += kills
        clients, accounts = campaign.clients, campaign.accounts
        print(
            f"{done} kills ({dict(campaign.kills)}), {len(campaign.traces.made)} traces, "
            f"{clients.acknowledged} spans acknowledged, answers {dict(clients.statuses)}, "
            f"{len(campaign.traces.active())} signals active as expected, accounts correct in "
            f"{accounts.samples} samples (at most {accounts.most_in_flight} in flight), "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        shutil.rmtree(directory)
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
