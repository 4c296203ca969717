"""The correlate stage with its log, index, dead letters and checkpoints, and steps of a fold that
fail when they are told to. For tests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from betrace.service.otlp.columns import Rows, SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages.correlate import CorrelateStage, LateSpans, NotNow, TraceLimits
from betrace.service.rules import names as names_module
from betrace.service.rules.names import NameTable
from betrace.service.rules.parse import parse
from betrace.service.signals import Signal
from betrace.service.traces import fold_kernels as fold_module
from betrace.service.traces import folding as run_module
from betrace.service.traces import pools
from betrace.service.traces import sweep_kernels as upkeep
from betrace.service.traces import table as table_module
from betrace.service.traces.arrays import empty_arrays
from betrace.service.traces.checkpoint import Snapshot, read_latest, write_checkpoint
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import HI, LO, POSITION_0, POSITION_COUNT, REPEATED, SPANS
from betrace.service.traces.table import TraceTable
from betrace.service.traces.tenant_traces import Recalled, TenantTraces
from betrace.service.traces.verdicts import decide_due
from tests.support.engine import compiled, standing, told_by
from tests.support.oracle import OracleSpan, breach
from tests.support.spans import S, body

SECOND = 10**9

RULES = (
    "count(a) == 2",
    "when { a } always { b }",
    'count(a.where(x matches "^v")) < 2',
    "count(db.*) > 2",
    '*.where(x == "v1") or count(*) < 4',
    "a before b",
)

STEPS: tuple[tuple[Any, str], ...] = (
    (fold_module, "fold"),
    (fold_module, "add_asked"),
    (pools, "find_slot"),
    (upkeep, "count_entries"),
    (upkeep, "copy_out"),
    (upkeep, "clear_dirty"),
    (upkeep, "close"),
    (upkeep, "reopen"),
    (run_module, "doubled"),
    (run_module, "evaluate"),
    (table_module, "grown"),
    (table_module, "broken"),
    (table_module, "next_steps"),
    (TraceTable, "copy"),
    (TraceTable, "close"),
    (TraceTable, "recall"),
    (TraceTable, "mark_partial"),
    (TraceTable, "trace_id"),
    (TenantTraces, "_service_numbers"),
    (NameTable, "forget"),
    (NameTable, "glob_checks"),
)


class Fault:
    """Lets the steps of a fold fail: after so many that work, so many times."""

    def __init__(self) -> None:
        self._after = self._times = 0
        self._spared = False
        self.met = 0
        self.only: str | None = None
        """The name of a step, where no other fails."""

    def arm(self, after: int, times: int = 1) -> None:
        self._after, self._times = after, times

    def meet(self, step: str) -> None:
        if self._spared or self.only not in (None, step):
            return
        self._after -= 1
        if self._after < 0 < self._times:
            self._times -= 1
            self.met += 1
            raise (MemoryError if self.met % 2 else RuntimeError)("says the test")

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Within, nothing fails."""
        before, self._spared = self._spared, True
        try:
            yield
        finally:
            self._spared = before

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Within, the steps may fail, and everything is too small at first."""

        def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **more: Any) -> Any:
                self.meet(name)
                return original(*args, **more)

            return step

        def undo(*args: Any) -> Any:
            with self.spared():
                return drop(*args)

        drop = TraceTable.drop
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(owner, name, failing(name, getattr(owner, name)))
            patch.setattr(TraceTable, "drop", undo)
            patch.setattr(table_module, "empty_arrays", _tiny)
            patch.setattr(names_module, "_LEARNED_SLOTS", 8)
            patch.setattr(names_module, "_LEARNED_CHECKS", 12)
            yield


class World:
    """A stage, what it reads and what reads it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fault = Fault()
        self.now = 1000 * SECOND
        self.rules = compiled([parse(rule) for rule in RULES])
        self.versions = 1
        self.log: list[bytes] = []
        self.sent: list[S] = []
        self.letters: list[list[int]] = []
        self.recovered: list[list[int]] = []  # letters in traces that no checkpoint has yet
        self.signals: list[Signal] = []
        self.index: dict[tuple[int, int], tuple[set[int], int]] = {}
        self.crashes = 0
        self.repeated = 0
        """Spans that a trace was given a second time."""
        self._begin()

    def _begin(self) -> None:
        self.progress, self.in_flight = LogProgress(), InFlight()
        self.closed = ClosedTraces(1 << 14)
        nothing: Any = None
        self.stage = CorrelateStage(
            lambda _: self.rules,
            nothing,
            nothing,
            self.progress,
            self.in_flight,
            TraceLimits(2 * SECOND, 3600 * SECOND, 1, 3600 * SECOND, 1000, 1000),
            LateSpans(self.closed, self.history),
            lambda: self.now,
        )

    # What happens

    def send(self, requests: list[list[S]], attempts: int = 1) -> None:
        """Append requests to the log and deliver them as one batch, a few times, then bury it."""
        bodies = [body(*spans) for spans in requests if spans]
        self.sent += [span for spans in requests for span in spans]
        first = len(self.log) + 1
        self.log += bodies
        positions = list(range(first, first + len(bodies)))
        self.progress.append("t", lambda: positions)
        self.deliver(self.read(positions), attempts)

    def deliver(self, batch: SpanBatch, attempts: int) -> None:
        self.now += SECOND // 4
        for _ in range(attempts):
            due, error = self.stage._fold([batch])
            self.decide(due)
            if error is None:
                break
            self.now += SECOND
        if not self.stage.has(batch):
            self.letters.append(batch.positions.tolist())
            self.progress.folded("t", self.letters[-1])

    def retry(self, attempts: int = 1) -> None:
        """Deliver what was buried again."""
        letters, self.letters = self.letters, []
        for positions in letters:
            self.progress.register("t", positions)
            self.deliver(self.read(positions), attempts)
            if positions not in self.letters:
                self.recovered.append(positions)

    def close(self, seconds: float = 3) -> None:
        """Let the clock tick; where that fails, the service dies."""
        self.now += int(seconds * SECOND)
        found, error = self.stage._close_due()
        self.decide(found)
        if error is not None:
            self.crash()

    def forget(self) -> None:
        """Free all closed traces."""
        self.close(0)
        for traces in self.stage.tenants.values():
            traces.evict(self.now + 10**12, 1, 0, self.closed)

    def new_rules(self) -> None:
        """The same rules as another version."""
        self.versions += 1
        self.rules = compiled([parse(rule) for rule in RULES], f"v{self.versions}")

    def checkpoint(self) -> bool:
        """Save the traces; whether they were."""
        try:
            snapshot = self.stage.snapshot()
        except NotNow:
            return False
        write_checkpoint(self.directory, snapshot)
        self.recovered.clear()
        return True

    def crash(self) -> None:
        """Go on from the last checkpoint, and the log beyond it."""
        self.crashes += 1
        self._begin()
        saved = read_latest(self.directory)
        snapshot = Snapshot(0, {}, []) if saved is None else saved
        with self.fault.spared():
            self.stage.restore(snapshot)
        last, pending = snapshot.progress.get("t", (0, []))
        beyond = [*pending, *range(last + 1, len(self.log) + 1)]
        letters = self.letters + self.recovered
        self.letters, self.recovered = [s for s in letters if not set(s) & set(beyond)], []
        for pair, (positions, _) in self.index.items():
            if min(positions) <= last:
                self.closed.add("t", np.array([pair], np.int64))
        self.stage.note_raised(self.signals)
        for at in range(0, len(beyond), 3):
            batch = self.read(beyond[at : at + 3])
            batch.replayed = True
            self.progress.register("t", beyond[at : at + 3])
            self.deliver(batch, 1)
        self.stage.replayed()
        self.stage.caught_up.set()

    # What is there

    def spans_of(self, trace: bytes) -> int:
        """How many spans an open trace has."""
        due = self.stage.look_up("t", trace.hex())
        return 0 if due is None else due.spans

    def read(self, positions: list[int]) -> SpanBatch:
        batch = scan_bodies("t", [self.log[position - 1] for position in positions])
        batch.positions = np.array(positions, np.int64)
        batch.received_ns = self.now
        return batch

    def history(self, tenant: str, ids: Rows) -> Iterator[Recalled]:
        """What the index and the log have of closed traces, one in each round."""
        for pair in map(tuple, ids.tolist()):
            self.fault.meet("history")
            if pair in self.index:
                batch = self.read(sorted(self.index[pair][0]))
                told = told_by(self.signals, f"{pair[0] % 2**64:016x}{pair[1] % 2**64:016x}")
                id = np.array([pair], np.int64)
                yield Recalled(id, [True], batch, ids[:0], [told])

    def decide(self, found: list[DueTraces]) -> None:
        for due in found:
            for row in due.rows if due.closed else ():
                self.repeated = max(self.repeated, int(row[REPEATED]))
                pair = (int(row[HI]), int(row[LO]))
                positions = set(row[POSITION_0 : POSITION_0 + row[POSITION_COUNT]].tolist())
                before = self.index.get(pair, (set(), 0))[0]
                self.index[pair] = positions | before, int(row[SPANS])
            for hi, lo, *more in () if due.spilled is None else due.spilled.tolist():
                before, spans = self.index.get((hi, lo), (set(), 0))
                self.index[hi, lo] = before | set(more), spans
            self.signals += decide_due(due, self.now).signals
            self.in_flight.leave(due.ticket)

    def settle(self) -> None:
        """Do what is left to do, without faults, and close all traces."""
        self.fault.arm(0, 0)
        self.stage.caught_up.set()
        self.retry()
        assert not self.letters
        self.close()
        assert not self.stage._held.open

    def check(self) -> None:
        """What stands is what the oracle says, and each trace has its spans."""
        traces: dict[bytes, list[OracleSpan]] = {}
        for s in self.sent:
            attributes = {"x": s.x} if s.x is not None else {}
            span = OracleSpan(s.name, s.trace, s.id.to_bytes(8, "big"), s.start, s.end)
            traces.setdefault(s.trace, []).append(span)
            span.attributes.update(attributes)
        assert standing(self.signals) == {
            (trace.hex(), f"r{i}")
            for trace, spans in traces.items()
            for i, rule in enumerate(RULES)
            if breach(parse(rule), spans)
        }
        found = {
            (hi % 2**64).to_bytes(8, "big") + (lo % 2**64).to_bytes(8, "big"): spans
            for (hi, lo), (_, spans) in self.index.items()
        }
        assert found == {trace: len(spans) for trace, spans in traces.items()}


def _tiny(_: int) -> Any:
    arrays = empty_arrays(1)
    return arrays._replace(
        table=np.zeros(2, np.int64),
        ring_middle=arrays.ring_middle[:1].copy(),
        ring_large=arrays.ring_large[:1].copy(),
        entries=arrays.entries[:1].copy(),
    )
