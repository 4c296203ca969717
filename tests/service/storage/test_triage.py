"""Mutes and acknowledgements on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from betrace.service.storage import triage
from betrace.service.storage.triage import Acknowledgement, Mute, TriageError, TriageStore

HOUR = 3600 * 10**9
NOW = 1_700_000_000 * 10**9


class Clock:
    now = NOW

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[TriageStore]:
    store = TriageStore(tmp_path / "triage.sqlite", clock)
    yield store
    store.close()


def test_a_mute_covers_its_time(store: TriageStore, clock: Clock) -> None:
    mute = store.mute("acme", "r", HOUR, "maintenance", "ann")
    assert mute == Mute(NOW, NOW + HOUR, "maintenance", "ann") == store.current_mute("acme", "r")
    for at, muted in ((NOW - 1, False), (NOW, True), (NOW + HOUR - 1, True), (NOW + HOUR, False)):
        assert store.muted("acme", "r", at) is muted
    assert not store.muted("acme", "other", NOW)
    assert not store.muted("beta", "r", NOW)
    clock.now += HOUR
    assert store.current_mute("acme", "r") is None
    assert store.muted("acme", "r", NOW)


def test_a_mute_can_be_replaced_and_ended(store: TriageStore, clock: Clock) -> None:
    store.mute("acme", "r", 10 * HOUR, "long", "ann")
    clock.now += HOUR
    assert store.mute("acme", "r", HOUR, "short", "bob") == store.current_mute("acme", "r")
    assert store.muted("acme", "r", NOW)
    assert not store.muted("acme", "r", NOW + 3 * HOUR)
    clock.now += 1
    assert store.unmute("acme", "r")
    assert not store.unmute("acme", "r")
    assert store.current_mute("acme", "r") is None
    assert not store.muted("acme", "r", clock.now)


def test_decisions_survive_a_restart_until_they_are_old(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "triage.sqlite"
    first = TriageStore(path, clock)
    first.mute("acme", "r", HOUR, "maintenance", "ann")
    first.acknowledge("acme", "a" * 32, "on it", "ann")
    first.close()
    second = TriageStore(path, clock)
    assert second.muted("acme", "r", NOW)
    known = second.acknowledgements("acme", ["a" * 32, "b" * 32])
    assert known == {"a" * 32: Acknowledgement(NOW, "ann", "on it")}
    second.close()
    clock.now += HOUR + triage.KEPT_NS + 1
    third = TriageStore(path, clock)
    assert not third.muted("acme", "r", NOW)
    third.close()


def test_an_acknowledgement_belongs_to_its_tenant(store: TriageStore, clock: Clock) -> None:
    store.acknowledge("acme", "a", "", "ann")
    clock.now += 1
    store.acknowledge("acme", "a", "again", "bob")
    assert store.acknowledgements("beta", ["a"]) == {}
    found = store.acknowledgements("acme", ["a"])
    assert found == {"a": Acknowledgement(NOW + 1, "bob", "again")}
    assert store.acknowledgements("acme", []) == {}
    store.mute("acme", "r", HOUR, "x", "ann")
    store.mute("beta", "r", HOUR, "x", "ann")
    store.delete_tenant("acme")
    assert store.acknowledgements("acme", ["a"]) == {}
    assert not store.muted("acme", "r", NOW + 1)
    assert store.muted("beta", "r", NOW + 1)


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    damaged = tmp_path / "triage.sqlite"
    damaged.write_bytes(b"no database" * 1000)
    with pytest.raises(TriageError, match="the file is damaged"):
        TriageStore(damaged)
    newer = tmp_path / "newer.sqlite"
    store = TriageStore(newer)
    store._db.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(TriageError, match="newer program"):
        TriageStore(newer)
