"""Tests that every ledger must pass. A test module subclasses :class:`LedgerConformance` with a
fixture ``open_ledger``, a function that opens the same ledger again at each call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from betrace.service.signals import Kind, Signal, signal_id
from betrace.service.storage.ledger.base import Ledger, LedgerError

OpenLedger = Callable[[], Ledger]


def make(
    number: int,
    rule: str = "r1",
    tenant: str = "shop",
    kind: Kind = Kind.RAISED,
    **changes: object,
) -> Signal:
    """A signal of trace ``number``; the same arguments give the same id."""
    trace = f"{number:032x}"
    values = {
        "severity": "high",
        "clause": "never",
        "detected_at": 1_790_000_000_123_456_789 + number,
        "early": False,
        "counts": {"pay": 2**40},
        "evidence": {"pay": ["00f067aa0ba902b7"]},
        "message": "paid twice – größer",
        "labels": {"team": "checkout"},
        "reason": None if kind is Kind.RAISED else "late spans",
    } | changes
    return Signal(
        id=signal_id(tenant, rule, "0" * 16, trace, kind),
        tenant=tenant,
        rule_id=rule,
        rule_version="0" * 16,
        kind=kind,
        trace_id=trace,
        **values,  # type: ignore[arg-type]
    )


class LedgerConformance:
    @pytest.fixture
    def ledger(self, open_ledger: OpenLedger) -> Iterator[Ledger]:
        ledger = open_ledger()
        yield ledger
        ledger.close()

    def test_an_empty_ledger(self, ledger: Ledger) -> None:
        assert ledger.record([]) == []
        assert ledger.balance("shop", "r1") == 0
        assert ledger.balances("shop") == {}

    def test_balances_are_raised_minus_retracted(self, ledger: Ledger) -> None:
        assert ledger.record([make(1), make(2), make(3, "r2")]) == [True] * 3
        assert ledger.balances("shop") == {"r1": 2, "r2": 1}
        assert ledger.record([make(1, kind=Kind.RETRACTED)]) == [True]
        assert ledger.balance("shop", "r1") == 1
        assert ledger.record([make(3, "r2", kind=Kind.RETRACTED)]) == [True]
        assert ledger.balances("shop") == {"r1": 1, "r2": 0}

    def test_a_repeat_changes_nothing(self, ledger: Ledger) -> None:
        ledger.record([make(1), make(2)])
        assert ledger.record([make(2), make(3), make(1)]) == [False, True, False]
        assert ledger.record([make(3, message="worded differently")]) == [False]
        assert ledger.balance("shop", "r1") == 3

    def test_a_repeat_within_a_batch(self, ledger: Ledger) -> None:
        assert ledger.record([make(1), make(1), make(1, kind=Kind.RETRACTED), make(1)]) == [
            True,
            False,
            True,
            False,
        ]
        assert ledger.balance("shop", "r1") == 0

    def test_tenants_are_separate(self, ledger: Ledger) -> None:
        ledger.record([make(1, tenant="a"), make(1, tenant="b"), make(2, tenant="b")])
        assert (ledger.balances("a"), ledger.balances("b")) == ({"r1": 1}, {"r1": 2})
        assert ledger.balances("c") == {}

    def test_a_large_batch(self, ledger: Ledger) -> None:
        signals = [make(i, f"r{i % 7}") for i in range(1300)]
        assert ledger.record(signals) == [True] * 1300
        assert ledger.record(signals) == [False] * 1300
        assert sum(ledger.balances("shop").values()) == 1300

    def test_recorded_signals_survive_a_restart(self, open_ledger: OpenLedger) -> None:
        first = open_ledger()
        first.record([make(1)])
        first.close()
        second = open_ledger()
        assert second.record([make(1), make(2)]) == [False, True]
        assert second.balance("shop", "r1") == 2
        second.close()

    def test_a_bad_id_is_a_permanent_error_and_records_nothing(self, ledger: Ledger) -> None:
        for bad in ("", "0" * 32, "f" * 32, "x" * 32, "12", " " + "1" * 31):
            wrong = Signal(**(make(2).to_json() | {"id": bad}))
            with pytest.raises(LedgerError, match="32 hex digits") as caught:
                ledger.record([make(1), wrong])
            assert not caught.value.transient
        assert ledger.balances("shop") == {}

    def test_many_threads(self, ledger: Ledger) -> None:
        new: list[bool] = []

        def work(first: int) -> None:
            for start in range(first, first + 40, 10):
                new.extend(ledger.record([make(i) for i in range(start, start + 20)]))
                ledger.balances("shop")

        threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(new) == ledger.balance("shop", "r1") == 100

    def test_a_closed_ledger_raises(self, open_ledger: OpenLedger) -> None:
        ledger = open_ledger()
        ledger.close()
        ledger.close()
        with pytest.raises(LedgerError, match="closed") as caught:
            ledger.record([make(1)])
        assert not caught.value.transient
        with pytest.raises(LedgerError, match="closed"):
            ledger.balances("shop")
