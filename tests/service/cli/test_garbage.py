"""Full collections visit new objects, and everything once the frozen ones have doubled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from betrace.service.cli import garbage
from betrace.service.cli.garbage import short_pauses


class Ring:
    """Is freed only by the collector."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def by_hand() -> Iterator[None]:
    """Collect only when the test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    assert not gc.get_freeze_count()


def test_survivors_of_a_full_collection_are_not_visited_again() -> None:
    before = len(gc.get_objects())
    with short_pauses():
        gc.collect()
        assert gc.get_freeze_count() >= before * 0.9
        assert len(gc.get_objects()) < before / 10
        gc.collect(1)
        frozen = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        gc.collect(1)
        assert gc.get_freeze_count() == frozen  # only a full one freezes
        gc.collect()
        assert gc.get_freeze_count() >= frozen + len(kept)
    assert len(gc.get_objects()) >= before * 0.9


def test_new_cycles_are_found() -> None:
    with short_pauses():
        gc.collect()
        ring = weakref.ref(Ring())
        gc.collect()
        assert ring() is None


def test_frozen_cycles_are_found_after_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "LEAST", 0)
    monkeypatch.setattr(garbage, "GROWTH", 1.01)
    with short_pauses():
        alive = Ring()
        ring = weakref.ref(alive)
        gc.collect()  # visits everything, and freezes the cycle
        del alive
        gc.collect()
        assert ring() is not None
        kept = [[] for _ in range(gc.get_freeze_count() // 10)]
        gc.collect()  # notices a tenth more
        gc.collect()
        assert ring() is None
        assert kept


def test_the_service_runs_with_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    from betrace.service.app import builder
    from betrace.service.cli import serve as running

    seen = []

    def stop_there(*_: object) -> None:
        seen.extend(
            each for each in gc.callbacks if type(each).__module__ == "betrace.service.cli.garbage"
        )
        raise RuntimeError("far enough")

    monkeypatch.setattr(builder, "open_service", stop_there)
    with pytest.raises(RuntimeError, match="far enough"):
        running.run_service(None)  # type: ignore[arg-type]
    assert len(seen) == 1
    assert seen[0] not in gc.callbacks
