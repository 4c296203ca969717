"""The service with its ledger in TigerBeetle. Under load, both are killed and the server is paused.
Skipped if ``tigerbeetle`` is not installed."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger
from tests.crash.campaign import Campaign, same
from tests.crash.victim import START_SECONDS, ServiceProcess
from tests.crash.workload import TENANTS
from tests.support.process import environment
from tests.support.tigerbeetle_server import BATCH, CLUSTER, MISSING, PROGRAM, Server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=MISSING)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.close()


def test_the_service_and_the_server_are_killed_under_load(tmp_path: Path, server: Server) -> None:
    settings = {
        "ledger__kind": "tigerbeetle",
        "ledger__tigerbeetle__addresses": server.address,
        "ledger__tigerbeetle__cluster_id": str(CLUSTER),
        "ledger__tigerbeetle__batch_transfers": str(BATCH),
        "ledger__tigerbeetle__start_seconds": "2",
    }
    with Campaign(tmp_path / "service", 31, **settings) as campaign:
        victim = campaign.victim
        campaign.kill("running")
        time.sleep(1)
        server.kill()  # and the service too, which starts without it
        time.sleep(3)
        victim.kill()
        victim.start()
        victim.wait_ready()
        time.sleep(1)
        server.start()
        time.sleep(3)
        server.pause()
        time.sleep(4)
        server.resume()
        campaign.kill("running")
        campaign.verify()
        expected = campaign.traces.active()
        assert expected, "the test compares nothing"
        compare(victim.data, server, tmp_path / "other.sqlite")
        files = list(victim.data.glob("*/*.duckdb*"))  # rebuilt below from the ledger
        assert len(files) >= len(TENANTS)
        for file in files:
            file.unlink()
        victim.start()
        victim.wait_ready()
        same(expected, campaign.shown(), "active in the API after a rebuild")
        assert victim.stop() == 0
        rebuild_journal(victim)
        victim.start()
        victim.wait_ready()
        same(expected, campaign.shown(), "active in the API after a rebuild of the journal")
        nothing_is_outgoing(victim)
        assert victim.stop() == 0
        compare(victim.data, server, tmp_path / "rebuilt.sqlite")
    assert "Traceback" not in victim.log()


def rebuild_journal(victim: ServiceProcess) -> None:
    """Lose the journal and rebuild it."""
    with closing(SqliteLedger(victim.data / "ledger.sqlite")) as journal:
        signals = sum(journal.count(tenant) for tenant in TENANTS)
    for file in victim.data.glob("ledger.sqlite*"):
        file.unlink()
    command = ["-m", "betrace.service", "ledger", "rebuild", "--data", str(victim.data), "--json"]
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(**victim.settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signals"] == signals


def nothing_is_outgoing(victim: ServiceProcess) -> None:
    """Return when the cluster has all signals of the journal of a running service."""
    end = time.monotonic() + START_SECONDS
    with closing(sqlite3.connect(victim.data / "ledger.sqlite")) as journal:
        while journal.execute("SELECT count(*) FROM outgoing").fetchone() != (0,):
            assert time.monotonic() < end, "signals are not sent"
            time.sleep(0.2)


def compare(data: Path, server: Server, copy: Path) -> None:
    """Check that the cluster has the balances of the journal of acknowledged signals."""
    shutil.copy(data / "ledger.sqlite", copy)
    journal = SqliteLedger(copy)
    ledger = TigerBeetleLedger(server.address, CLUSTER, journal, BATCH)
    try:
        assert journal.outgoing() == []
        for tenant in TENANTS:
            assert journal.balances(tenant)
            assert ledger.balances(tenant) == journal.balances(tenant)
    finally:
        ledger.close()
