"""The ledger that the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from betrace.service.config.settings import Settings
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.open import LEDGER_FILE, open_ledger
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.fake_tigerbeetle import Cluster
from tests.support.ledger_conformance import make


def settings(path: Path, **sections: dict[str, Any]) -> Settings:
    return Settings(storage={"path": path}, **sections)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    from betrace.service.storage.ledger import tigerbeetle

    kept = list(tigerbeetle.TigerBeetleLedger.__init__.__defaults__)
    kept[-1] = cluster.connect
    monkeypatch.setattr(tigerbeetle.TigerBeetleLedger.__init__, "__defaults__", tuple(kept))
    return cluster


def test_a_data_directory_may_change_its_kind(tmp_path: Path, cluster: Cluster) -> None:
    plain, beetle = settings(tmp_path), settings(tmp_path, ledger={"kind": "tigerbeetle"})
    first = open_ledger(plain)
    first.record([make(1)])
    first.close()
    second = open_ledger(beetle)
    assert second.kind == "tigerbeetle"
    assert second.record([make(1), make(2)]) == [False, True]
    assert len(cluster.transfers) == 1
    second.close()
    assert all(client.closed for client in cluster.clients)
    journal = SqliteLedger(tmp_path / LEDGER_FILE)
    journal.add_outgoing([make(3)])  # as a process that died
    journal.close()
    third = open_ledger(plain)
    assert third.kind == "sqlite"
    assert (third.count("shop"), third.outgoing()) == (3, [])
    third.close()


def test_a_cluster_of_another_release_stops_the_start(tmp_path: Path, cluster: Cluster) -> None:
    import tigerbeetle as tb

    cluster.script = iter([tb.ClientReleaseTooHighError()])
    with pytest.raises(LedgerError, match="upgrade the server"):
        open_ledger(settings(tmp_path, ledger={"kind": "tigerbeetle"}))
    assert all(client.closed for client in cluster.clients)


def test_a_timeout_in_which_no_client_registers_is_refused(tmp_path: Path) -> None:
    hasty = {"storage": {"timeout_seconds": 0.5}}
    with pytest.raises(LedgerError, match=r"breakers\.storage\.timeout_seconds is 0\.5"):
        open_ledger(settings(tmp_path, ledger={"kind": "tigerbeetle"}, breakers=hasty))


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        ("localhost:3000", "does not resolve host names"),
        ("127.0.0.1:3000,db1:3000", "does not resolve host names"),
        ("127.0.0.1:0", "port 0"),
        ("127.0.0.1", "not an address"),
        ("", "not an address"),
    ],
)
def test_addresses_are_of_the_network(addresses: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Settings(ledger={"tigerbeetle": {"addresses": addresses}})
    Settings(ledger={"tigerbeetle": {"addresses": "127.0.0.1:3000, [::1]:3001"}})
