"""The correlate stage with its log, index, dead letters and checkpoints, and steps of a fold that
fail on demand. For tests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from betrace.service.otlp.columns import Rows, SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.open_traces import NotNow, OpenTraces
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages import correlate
from betrace.service.pipeline.stages.correlate import CorrelateStage
from betrace.service.rules import names
from betrace.service.rules.names import NameTable
from betrace.service.rules.parse import parse
from betrace.service.signals import Signal
from betrace.service.traces import fold_kernels, folding, pools, sweep_kernels, table
from betrace.service.traces.arrays import empty_arrays
from betrace.service.traces.checkpoint import Snapshot, read_latest, write_checkpoint
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import HI, LO, POSITION_0, POSITION_COUNT, REPEATED, SPANS
from betrace.service.traces.limits import LateSpans, TraceLimits
from betrace.service.traces.table import TraceTable
from betrace.service.traces.tenant_traces import Recalled, TenantTraces
from betrace.service.traces.verdicts import decide_due
from tests.support.engine import active, compiled, signal_history
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
    (fold_kernels, "fold"),
    (fold_kernels, "add_asked"),
    (pools, "find_slot"),
    (sweep_kernels, "count_entries"),
    (sweep_kernels, "copy_out"),
    (sweep_kernels, "clear_dirty"),
    (sweep_kernels, "close"),
    (sweep_kernels, "reopen"),
    (folding, "doubled"),
    (folding, "evaluate"),
    (table, "grown"),
    (table, "broken"),
    (table, "next_signals"),
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
    """Makes steps of a fold fail: a number of times, after a number of successful steps."""

    def __init__(self) -> None:
        self._after = self._times = 0
        self._spared = False
        self.met = 0
        self.only: str | None = None
        """The name of the only step that fails; None for all."""

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
        """Inside, nothing fails."""
        before, self._spared = self._spared, True
        try:
            yield
        finally:
            self._spared = before

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, the steps may fail, and all capacities are too small at first."""

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
            # Slices measure CPU time, and a kernel may be compiled within one.
            patch.setattr(correlate, "FIRST_SLICE", 3600.0)
            patch.setattr(correlate, "ALL_SLICES", 3600.0)
            patch.setattr(table, "empty_arrays", _tiny)
            patch.setattr(names, "_LEARNED_SLOTS", 8)
            patch.setattr(names, "_LEARNED_CHECKS", 12)
            yield


class World:
    """A stage, its inputs and its outputs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fault = Fault()
        self.now = 1000 * SECOND
        self.rules = compiled([parse(rule) for rule in RULES])
        self.versions = 1
        self.log: list[bytes] = []
        self.sent: list[S] = []
        self.letters: list[list[int]] = []
        self.recovered: list[list[int]] = []  # letters in traces that are in no checkpoint yet
        self.signals: list[Signal] = []
        self.index: dict[tuple[int, int], tuple[set[int], int]] = {}
        self.crashes = 0
        self.repeated = 0
        """The most spans that a trace received twice."""
        self._begin()

    def _begin(self) -> None:
        self.progress, self.in_flight = LogProgress(), InFlight()
        self.closed = ClosedTraces(1 << 14)
        nothing: Any = None
        self.traces = OpenTraces(
            lambda _: self.rules,
            TraceLimits(2 * SECOND, 3600 * SECOND, 1, 3600 * SECOND, 1000, 1000),
            LateSpans(self.closed, self.history),
            self.progress,
            self.in_flight,
            lambda: self.now,
        )
        self.stage = CorrelateStage(self.traces, nothing, nothing)

    # Events

    def send(self, requests: list[list[S]], attempts: int = 1) -> None:
        """Append requests to the log and deliver them as one batch, at most ``attempts`` times;
        after that it becomes a dead letter."""
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
            due, error, _ = self.stage._fold([batch], {})
            self.decide(due)
            if error is None:
                break
            self.now += SECOND
        if not self.traces.has(batch):
            self.letters.append(batch.positions.tolist())
            self.progress.folded("t", self.letters[-1])

    def retry(self, attempts: int = 1) -> None:
        """Deliver the dead letters again."""
        letters, self.letters = self.letters, []
        for positions in letters:
            self.progress.register("t", positions)
            self.deliver(self.read(positions), attempts)
            if positions not in self.letters:
                self.recovered.append(positions)

    def close(self, seconds: float = 3) -> None:
        """Let the timer run; if that fails, the service crashes."""
        self.now += int(seconds * SECOND)
        found, error = self.stage._close_due()
        self.decide(found)
        if error is not None:
            self.crash()

    def forget(self) -> None:
        """Free all closed traces."""
        self.close(0)
        for traces in self.traces.tenants.values():
            traces.evict(self.now + 10**12, 1, 0, self.closed)

    def new_rules(self) -> None:
        """Use the same rules as another version."""
        self.versions += 1
        self.rules = compiled([parse(rule) for rule in RULES], f"v{self.versions}")

    def checkpoint(self) -> bool:
        """Save the traces; returns whether they could be saved."""
        try:
            snapshot = self.traces.snapshot()
        except NotNow:
            return False
        write_checkpoint(self.directory, snapshot)
        self.recovered.clear()
        return True

    def crash(self) -> None:
        """Continue from the last checkpoint and the log after it."""
        self.crashes += 1
        self._begin()
        saved = read_latest(self.directory)
        snapshot = Snapshot(0, {}, []) if saved is None else saved
        with self.fault.spared():
            self.traces.restore(snapshot)
        last, pending = snapshot.progress.get("t", (0, []))
        beyond = [*pending, *range(last + 1, len(self.log) + 1)]
        letters = self.letters + self.recovered
        self.letters, self.recovered = [s for s in letters if not set(s) & set(beyond)], []
        for pair, (positions, _) in self.index.items():
            if min(positions) <= last:
                self.closed.add("t", np.array([pair], np.int64))
        self.traces.note_raised(self.signals)
        for at in range(0, len(beyond), 3):
            batch = self.read(beyond[at : at + 3])
            batch.replayed = True
            self.progress.register("t", beyond[at : at + 3])
            self.deliver(batch, 1)
        self.stage.replayed()
        self.stage.caught_up.set()

    # State

    def spans_of(self, trace: bytes) -> int:
        """The number of spans of an open trace."""
        due = self.traces.look_up("t", trace.hex())
        return 0 if due is None else due.spans

    def read(self, positions: list[int]) -> SpanBatch:
        batch = scan_bodies("t", [self.log[position - 1] for position in positions])
        batch.positions = np.array(positions, np.int64)
        batch.received_ns = self.now
        return batch

    def history(self, tenant: str, ids: Rows) -> Iterator[Recalled]:
        """Reads closed traces from the index and the log, one at a time."""
        for pair in map(tuple, ids.tolist()):
            self.fault.meet("history")
            if pair in self.index:
                batch = self.read(sorted(self.index[pair][0]))
                trace_id = f"{pair[0] % 2**64:016x}{pair[1] % 2**64:016x}"
                history = signal_history(self.signals, trace_id)
                id = np.array([pair], np.int64)
                yield Recalled(id, [True], batch, ids[:0], [history])

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
        """Do the remaining work without faults, and close all traces."""
        self.fault.arm(0, 0)
        self.stage.caught_up.set()
        self.retry()
        assert not self.letters
        self.close()
        assert not self.traces.totals.open

    def check(self) -> None:
        """The active signals are those of the oracle, and each trace has all its spans."""
        traces: dict[bytes, list[OracleSpan]] = {}
        for s in self.sent:
            attributes = {"x": s.x} if s.x is not None else {}
            span = OracleSpan(s.name, s.trace, s.id.to_bytes(8, "big"), s.start, s.end)
            traces.setdefault(s.trace, []).append(span)
            span.attributes.update(attributes)
        assert active(self.signals) == {
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
