"""Stores that fail as the test says, and what goes into them. For tests only."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.signals import Kind, Signal, signal_id
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.ledger.base import LedgerError, RefusedError, transfer
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    FIRST_SEEN,
    HI,
    LAST_SEEN,
    LO,
    NAME_BYTES,
    POSITION_0,
    POSITION_COUNT,
    SLOT_COLUMNS,
    SPANS,
)
from betrace.service.traces.verdicts import Decided
from tests.support.virtual import Hang

RULES = compile_rules([make_rule({"id": "no-loop", "condition": 'count("loop") < 2'})], "v1")


def signal(number: int, tenant: str = "acme") -> Signal:
    trace_id = f"{number + 1:032x}"
    return Signal(
        id=signal_id(tenant, "r", "v", trace_id, Kind.RAISED),
        tenant=tenant,
        rule_id="r",
        rule_version="v",
        severity="high",
        kind=Kind.RAISED,
        clause="always",
        trace_id=trace_id,
        detected_at=1000 + number,
        early=False,
        counts={"a": 1},
        evidence={"a": ["b7ad6b7169203331"]},
        message="broken",
        labels={"team": "payments"},
    )


def due(*numbers: int, tenant: str = "acme", closed: bool = True, spans: int = 1) -> DueTraces:
    """Closed traces without matches."""
    rows = np.zeros((len(numbers), SLOT_COLUMNS), np.int64)
    rows[:, HI] = 0
    rows[:, LO] = [number + 1 for number in numbers]
    rows[:, SPANS] = spans
    rows[:, FIRST_SEEN] = 1000
    rows[:, LAST_SEEN] = 2000
    rows[:, POSITION_COUNT] = 1
    rows[:, POSITION_0] = [number + 1 for number in numbers]
    return DueTraces(
        tenant,
        RULES,
        closed,
        rows,
        np.zeros((len(numbers), NAME_BYTES), np.uint8),
        np.zeros((0, 14), np.int64),
        np.zeros(len(numbers) + 1, np.int64),
        ["", "shop"],
    )


def decided(*numbers: int, tenant: str = "acme", ticket: int = 0) -> Decided:
    signals = [signal(number, tenant) for number in numbers]
    return Decided(tenant, signals, due(*numbers, tenant=tenant), None, 1000, ticket)


class Faulty:
    """What happens to the calls of a store: ``fault`` is None, "error", "late error" (after the
    work was done) or "hang"; ``script`` gives it for each call while it lasts."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.script: Iterator[str | None] = iter(())
        self.calls = 0
        self._hang = Hang()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Calls made within hang; afterwards they go on."""
        self.fault = "hang"
        try:
            yield
        finally:
            self.fault = None
            self._hang.release()

    def meet(self, error: Exception, work: Callable[[], None]) -> None:
        """Do the work, or fail."""
        self.calls += 1
        fault = next(self.script, self.fault)
        if fault == "error":
            raise error
        if fault == "hang":
            self._hang.wait()
        work()
        if fault == "late error":
            raise error


class FaultyLedger(Faulty):
    """Counts how often each id was new; order is that of recording."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.new: Counter[str] = Counter()
        self.transient = True
        self.refused: set[str] = set()
        """Ids that are never taken."""
        self.replaced = 0
        self._lock = threading.Lock()

    def replace(self, since: float) -> None:
        self.replaced += 1

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        answers: list[bool] = []
        for each in signals:
            transfer(each)

        def work() -> None:
            with self._lock:
                for each in signals:
                    is_new = each.id not in self.new and each.id not in self.refused
                    answers.append(is_new)
                    if is_new:
                        self.new[each.id] += 1
                        self.order.append(each.id)

        self.meet(LedgerError("the ledger is away", transient=self.transient), work)
        refused = {i: "never" for i, s in enumerate(signals) if s.id in self.refused}
        if refused:
            raise RefusedError(answers, refused)
        return answers


class FaultyStore(Faulty):
    """Keeps the ids of signals and the numbers of traces by tenant, in the order of writing."""

    def __init__(self) -> None:
        super().__init__()
        self.signals: dict[str, list[str]] = {}
        self.traces: dict[str, list[bytes]] = {}
        self.transient = True
        self.poison: str | None = None
        """A trace (hex) that cannot be written."""

    def write(self, tenant, *, signals=(), traces=None, frames=None):
        ids = [] if traces is None else traces["trace_id"].to_pylist()
        if self.poison is not None and bytes.fromhex(self.poison) in ids:
            raise StoreError("a row that does not fit", transient=False)

        def work() -> None:
            self.signals.setdefault(tenant, []).extend(each.id for each in signals)
            self.traces.setdefault(tenant, []).extend(ids)

        self.meet(StoreError("DuckDB is away", transient=self.transient), work)
        return len(signals)
