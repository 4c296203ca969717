"""A lost journal of TigerBeetle is rebuilt from DuckDB, and the cluster keeps its transfers."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from betrace.service.cli.main import cli
from betrace.service.config.settings import Settings
from betrace.service.pipeline.request import Done
from betrace.service.signals import Signal
from betrace.service.storage.ledger import packed
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger
from tests.support.fake_tigerbeetle import Cluster
from tests.support.inprocess import (
    active_signals,
    closed,
    ledger_signals,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.ledger_conformance import make
from tests.support.spans import S


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(packed, "connect", cluster.connect)
    return cluster


def trace(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def filled(tmp_path: Path) -> tuple[Settings, list[Signal], set[tuple[str, str]]]:
    """A service that raised, retracted and raised again; its signals and the active ones."""
    write_rules(tmp_path, {"more-a": "count(a) > count(b)", "no-c": "never { c }"})
    config = settings(tmp_path, ledger={"kind": "tigerbeetle"})
    async with running(config) as service:
        for spans in ([S(1, "a")], [S(2, "b")], [S(3, "a")], [S(4, "c", trace=trace(2))]):
            assert await send(service, spans) == Done(1)
            await closed(service)
        return config, ledger_signals(service), active_signals(service)


def lose(config: Settings) -> None:
    path = config.storage.path / "ledger.sqlite"
    for name in ("-wal", "-shm", ""):
        path.with_name(path.name + name).unlink(missing_ok=True)


def rebuild(config: Settings, *more: str) -> Any:
    done = CliRunner().invoke(
        cli,
        ["ledger", "rebuild", "--data", str(config.storage.path), "--json", *more],
        env={"BETRACE_LEDGER__KIND": "tigerbeetle"},
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("empty", [False, True], ids=["the cluster has them", "it is new, too"])
async def test_signals_are_recorded_once_after_a_rebuild(tmp_path, cluster, empty):
    config, signals, active = await filled(tmp_path)
    before = dict(cluster.transfers)
    assert len(before) == len(signals) >= 4
    lose(config)
    if empty:
        cluster.transfers.clear()
        cluster.accounts.clear()
    with pytest.raises(LedgerError, match="betrace ledger rebuild"):
        async with running(config):
            pass
    assert rebuild(config) == {"tenants": 1, "signals": len(signals), "uncertain": []}
    assert rebuild(config)["signals"] == 0
    async with running(config) as service:
        found = ledger_signals(service)
        assert sorted(s.id for s in found) == sorted(s.id for s in signals)
        assert active_signals(service) == active
        assert cluster.transfers == before
        assert service.ledger.balances("default") == {"more-a": 1, "no-c": 1}
        assert await send(service, [S(6, "b")]) == Done(1)  # a late span
        await closed(service)
        assert service.ledger.balances("default") == {"more-a": 0, "no-c": 1}
    assert len(cluster.transfers) == len(signals) + 1


async def test_what_was_exported_is_not_exported_again(tmp_path, cluster):
    config, signals, _ = await filled(tmp_path)
    progress = config.storage.path / "export" / "webhook.json"
    progress.parent.mkdir()
    progress.write_text('{"default": 7000}')
    lose(config)
    rebuild(config, "--exported")
    last = json.loads(progress.read_text())["default"]
    async with running(config) as service:
        entries = service.ledger.entries("default")
        assert [number for number, _ in entries] == list(range(7001, 7001 + len(signals)))
        assert last == entries[-1][0]
        assert await send(service, [S(6, "b")]) == Done(1)
        await closed(service)
        assert len(service.ledger.entries("default", last)) == 1


def test_refused_signals_use_up_their_numbers(tmp_path, cluster):
    """What is exported after a rebuild begins above the numbers of all signals rebuilt."""
    path = tmp_path / "ledger.sqlite"
    journal = SqliteLedger(path)
    journal.number_after(100)
    journal.add_outgoing([make(1), make(2), make(3)])
    assert journal.last_number() == 103
    cluster.failed.add(int(make(2).id, 16))
    ledger = TigerBeetleLedger("127.0.0.1:3000", 0, journal)
    ledger.start(60)
    assert [number for number, _ in ledger.entries("shop")] == [101, 102]
    assert ledger.record([make(4)]) == [True]
    assert ledger.last_entry("shop") == 104
    ledger.close()


def test_a_start_waits_while_signals_are_sent_again(tmp_path, cluster, monkeypatch):
    """The time to start counts only while nothing is sent."""
    monkeypatch.setattr("betrace.service.storage.ledger.tigerbeetle.PAGE", 10)
    journal = SqliteLedger(tmp_path / "ledger.sqlite")
    journal.add_outgoing([make(number) for number in range(60)])
    cluster.script = itertools.repeat(lambda: time.sleep(0.25))
    ledger = TigerBeetleLedger("127.0.0.1:3000", 0, journal)
    ledger.start(1)
    assert ledger.outgoing() == []
    assert ledger.clients.replaced == 0
    assert len(cluster.transfers) == ledger.count("shop") == 60
    ledger.close()
