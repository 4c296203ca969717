"""A short campaign: one fault of each kind under load, and a comparison with the oracle.
``python -m tests.cluster`` runs long ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.campaign import SETTLE_SECONDS, Campaign
from tests.support.nats_servers import MISSING, PROGRAM

FAULTS = (
    "partitions doubled",
    "evaluator frozen",
    "edge killed",
    "query node killed",
    "rules changed",
    "evaluator killed",
    "server killed",
    "evaluator drained",
)


@pytest.mark.slow
def test_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with Campaign(tmp_path, seed=1, rate=20.0, evaluators=2) as campaign:
        for fault in FAULTS:
            time.sleep(1)  # under load
            campaign.faults.inject(fault)
        campaign.faults.repaired(SETTLE_SECONDS)
        campaign.verify()
    assert set(campaign.faults.counts) == set(FAULTS)
    assert campaign.traces.active()
