"""The real service, killed under load, evaluates all acknowledged spans exactly once.

The long run is ``python -m tests.crash --kills 50``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.campaign import Campaign

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [7])
def test_nothing_acknowledged_is_lost_or_duplicated(tmp_path: Path, seed: int) -> None:
    with Campaign(tmp_path, seed) as campaign:
        for moment in ("running", "starting", "stopping"):
            campaign.kill(moment)
        campaign.verify()
    assert campaign.kills.total() == 3
    assert campaign.traces.active(), "the test compares nothing"
    assert campaign.accounts.samples > 10
    assert "Traceback" not in campaign.victim.log()
