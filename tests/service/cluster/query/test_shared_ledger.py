"""Query nodes that share a TigerBeetle cluster: each has all signals, and each signal counts once.
The cluster is in memory; tests/cluster/test_shared_ledger.py has a real one."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tigerbeetle as tb
import trio

from betrace.service.app.service import Service
from betrace.service.config.settings import Settings
from betrace.service.signals import Kind, Signal
from betrace.service.storage.ledger import packed
from betrace.service.traces.verdicts import Decided
from tests.support.failing_stores import due, signal
from tests.support.fake_tigerbeetle import Cluster
from tests.support.inprocess import ledger_signals, running, settings, write_rules
from tests.support.query_nodes import FedNode, retraction

TENANTS = ("acme", "shop")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(packed, "connect", cluster.connect)
    return cluster


def node_settings(directory: Path, **more: Any) -> Settings:
    write_rules(directory, {"many": "count(a) > 1"}, "acme")
    tigerbeetle = {"addresses": "127.0.0.1:3000", "cluster_id": 0, "start_seconds": 0.2}
    return settings(directory, ledger={"kind": "tigerbeetle", "tigerbeetle": tigerbeetle}, **more)


def fill(node: FedNode, first: int, count: int = 10) -> list[Signal]:
    """Decide signals of two tenants in both partitions; the last signal is retracted, too."""
    made = []
    for number in range(first, first + count):
        tenant = TENANTS[number % 2]
        signals = [signal(number, tenant)]
        if number == first + count - 1:
            signals.append(retraction(signals[0]))
        node.outs[number % 2].add(Decided(tenant, signals, due(number, tenant=tenant)))
        made += signals
    return made


def ids(service: Service) -> list[str]:
    return sorted(each.id for tenant in TENANTS for each in ledger_signals(service, tenant))


def is_exact(service: Service, cluster: Cluster, signals: list[Signal]) -> None:
    """The node has the signals, each once, and so has the cluster."""
    expected = sorted(each.id for each in signals)
    assert ids(service) == expected
    assert sorted(f"{number:032x}" for number in cluster.transfers) == expected
    assert not cluster.failed
    for tenant in TENANTS:
        mine = [each for each in signals if each.tenant == tenant]
        active = sum(1 if each.kind is Kind.RAISED else -1 for each in mine)
        assert service.ledger.balances(tenant) == {"r": active}
        assert service.store.counts(tenant).signals == len(mine)
    assert not service.pipeline.record.fallback.pending


async def recorded(service: Service, signals: list[Signal]) -> None:
    """Return when the node's ledger has so many signals."""
    with trio.fail_after(60):
        while len(ids(service)) < len(signals):
            await trio.sleep(0.02)


async def test_two_nodes_record_each_signal_once(tmp_path, cluster):
    first, second = FedNode(), FedNode()
    second.outs = first.outs
    signals = fill(first, 0)
    one, two = (node_settings(tmp_path / name) for name in ("one", "two"))
    async with first.running(one) as a, second.running(two) as b:
        signals += fill(first, 10)
        await first.applied(a)
        await second.applied(b)
        for service in (a, b):
            is_exact(service, cluster, signals)
            # A signal that the other node recorded first is still new to this one.
            assert service.pipeline.record.counts.new == len(signals)
    assert len({number for name, number in cluster.requests if name == "create_transfers"}) >= 1
    assert len(cluster.accounts) == 4


async def test_a_node_that_lost_everything_reads_everything_again(tmp_path, cluster):
    node = FedNode()
    signals = fill(node, 0)
    async with node.running(node_settings(tmp_path / "one")) as service:
        await node.applied(service)
    async with node.running(node_settings(tmp_path / "another")) as service:
        await node.applied(service)
        is_exact(service, cluster, signals)


@pytest.mark.parametrize("dies", [False, True])
async def test_signals_wait_while_tigerbeetle_is_away(tmp_path, cluster, dies):
    """They are shown meanwhile, and recorded once when it is back, even if the node dies."""
    node = FedNode()
    signals = fill(node, 0)
    config = node_settings(
        tmp_path, breakers={"storage": {"timeout_seconds": 1, "open_seconds": 0.1}}
    )
    back = threading.Event()
    async with node.running(config) as service:
        await node.applied(service)
    cluster.script = itertools.repeat(lambda: back.wait(60) and None)
    async with node.running(config, die=dies) as service:
        signals += fill(node, 10)
        await node.applied(service)  # in files
        assert service.pipeline.record.fallback.pending
        assert len(ids(service)) == 11
        for tenant in TENANTS:
            mine = [each for each in signals if each.tenant == tenant]
            assert service.store.counts(tenant).signals == len(mine)
        back.set()
        if not dies:
            await recorded(service, signals)
            await written_back(service)
            is_exact(service, cluster, signals)
    async with node.running(config) as service:
        await recorded(service, signals)
        await written_back(service)
        is_exact(service, cluster, signals)


async def written_back(service: Service) -> None:
    """Return when nothing waits in files."""
    with trio.fail_after(60):
        while service.pipeline.record.fallback.pending:
            await trio.sleep(0.02)


async def test_a_ledger_that_evicts_a_node_gets_its_signals(tmp_path, cluster):
    """A TigerBeetle cluster has 64 sessions, and evicts the oldest when another node comes."""
    node = FedNode()
    config = node_settings(
        tmp_path, breakers={"storage": {"minimum_calls": 100, "timeout_seconds": 60}}
    )
    async with node.running(config) as service:
        cluster.script = iter([tb.ClientEvictedError()])
        signals = fill(node, 0)
        await node.applied(service)
        await recorded(service, signals)
        await written_back(service)
        is_exact(service, cluster, signals)
        assert service.ledger.clients.replaced == 1


async def test_one_process_and_a_cluster_agree_on_transfers(tmp_path, cluster):
    """The same signals from a service without a cluster are the same transfers."""
    node = FedNode()
    signals = fill(node, 0)
    async with node.running(node_settings(tmp_path / "one")) as service:
        await node.applied(service)
    before = dict(cluster.transfers)
    later = [replace(each, detected_at=each.detected_at + 10**9, message="x") for each in signals]
    async with running(node_settings(tmp_path / "two")) as service:
        assert await trio.to_thread.run_sync(service.ledger.record, later) == [True] * len(signals)
        assert cluster.transfers == before
