"""Two query nodes that share a real TigerBeetle server, under load: the server is killed and frozen
and the nodes are killed. Skipped without the programs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from betrace.service.storage.ledger.base import tenant_account
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger
from tests.cluster.campaign import ALL_TENANTS, SETTLE_SECONDS, Campaign
from tests.cluster.cluster import Cluster
from tests.cluster.nodes import Node
from tests.support import nats_servers
from tests.support.tigerbeetle_server import BATCH, CLUSTER, MISSING, PROGRAM, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
    pytest.mark.skipif(nats_servers.PROGRAM is None, reason=nats_servers.MISSING),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.close()


class SharedLedger(Cluster):
    """A cluster whose query nodes have their ledger in TigerBeetle."""

    def __init__(self, directory: Path, ledger: Server) -> None:
        super().__init__(directory, edges=1, evaluators=1, queries=2)
        self._ledger = ledger

    def _node(self, name: str, roles: str) -> Node:
        node = super()._node(name, roles)
        if "query" in roles:
            node.settings |= {
                "ledger__kind": "tigerbeetle",
                "ledger__tigerbeetle__addresses": self._ledger.address,
                "ledger__tigerbeetle__cluster_id": str(CLUSTER),
                "ledger__tigerbeetle__batch_transfers": str(BATCH),
                "ledger__tigerbeetle__start_seconds": "2",
            }
        return node


def test_each_signal_counts_once(tmp_path: Path, server: Server) -> None:
    campaign = Campaign(tmp_path / "cluster", seed=7, rate=20.0)
    campaign.cluster = SharedLedger(tmp_path / "cluster", server)
    with campaign:
        first, second = nodes = campaign.cluster.queries
        time.sleep(3)
        server.kill()
        time.sleep(3)
        restart(second)  # without the server
        server.start()
        time.sleep(3)
        server.pause()
        time.sleep(4)
        restart(first)
        server.resume()
        time.sleep(3)
        restart(second)
        campaign.verify()
        written_back(nodes)
        for node in nodes:
            assert node.stop() == 0, node.log()[-3000:]
            assert "Traceback" not in node.log()
        compare([node.data / "ledger.sqlite" for node in nodes], server, tmp_path)
    assert campaign.traces.active(), "the test compares nothing"


def restart(node: Node) -> None:
    node.kill()
    node.start()
    node.wait_ready()


def written_back(nodes: list[Node]) -> None:
    """Return when no signal waits for the ledger."""
    end = time.monotonic() + SETTLE_SECONDS
    for node in nodes:
        while any(each["pendingRecords"] for each in node.get("/api/admin/fallback")["fallbacks"]):
            assert time.monotonic() < end, "signals are not written back"
            time.sleep(0.2)


def compare(files: list[Path], server: Server, directory: Path) -> None:
    """All nodes have the same signals, and the cluster has each of them once."""
    copies = [directory / f"{number}.sqlite" for number in range(len(files))]
    for file, copy in zip(files, copies, strict=True):
        shutil.copy(file, copy)
    journals = [SqliteLedger(copy) for copy in copies]
    ledger = TigerBeetleLedger(server.address, CLUSTER, journals[0], BATCH)
    try:
        assert all(journal.outgoing() == [] for journal in journals)
        for tenant in ALL_TENANTS:
            signals = [
                {signal.id for _, signal in journal.entries(tenant, 0, 10**6)}
                for journal in journals
            ]
            assert signals[0], tenant
            assert all(some == signals[0] for some in signals)
            assert ledger.balances(tenant) == journals[1].balances(tenant)
            with ledger._using() as session:
                [account] = session.client.lookup_accounts([tenant_account(tenant)])
            assert account.credits_posted + account.debits_posted == len(signals[0])
    finally:
        ledger.close()
        for journal in journals[1:]:
            journal.close()
