"""Reads closed traces back that are no longer in memory, from their index rows and their frames in
the log, when late spans reopen them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import numpy as np

from betrace.channels import TransientError
from betrace.service.otlp.columns import SPAN_ID, TRACE_HI, TRACE_LO, Rows, SpanBatch
from betrace.service.rules.compile import CompiledRules
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import TraceRow
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.traces.signal_history import rule_signals
from betrace.service.traces.tenant_traces import Recalled

_log = logging.getLogger("service.history")

_MASK = 2**64 - 1

# Limits for the late spans of one batch; traces beyond them are reopened as partial.
MOST_TRACES = 5000
MOST_SECONDS = 2.0  # no further round starts after this

ROUND_TRACES = 256
# Spans of one round that are read even if the time is over; more are read until then.
LEAST_SPANS = 50_000
# Spans that are in memory at the same time, and at least those of one frame.
CHUNK_SPANS = 20_000
CHUNK_FRAMES = 32


class HistoryUnavailable(TransientError):  # noqa: N818
    """The trace index cannot answer now. Unlike a failure of the local store, this is not a reason
    to evaluate late spans without the earlier ones: whoever folds them waits."""


class TraceIndex(Protocol):
    """The index of stored traces: the local DuckDB, or a query node."""

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        """The traces that exist, by id, with the positions of all their frames."""

    def raised_of(
        self, tenant: str, trace_ids: Sequence[str]
    ) -> dict[str, list[tuple[str, str, int, int, str]]]:
        """For each trace that has signals, by rule: the rule's id and version, how many signals
        were raised and retracted, and the clause of the last one."""


class TraceHistory:
    """Reads closed traces back. Called in the folding thread, which it blocks, so it is bounded by
    ``most_traces`` (by default ``MOST_TRACES``) and, by the clock ``seconds``, in time.

    ``rules_at`` returns the rules of a frame. A trace keeps those of its first frame, so that its
    signals do not depend on whether it was still in memory, or is read again after a crash.
    """

    def __init__(
        self,
        store: TraceIndex,
        log: PartitionLog,
        max_body_bytes: int,
        behind: Callable[[str], bool] = lambda tenant: False,
        rules_at: Callable[[str, int], CompiledRules | None] = lambda tenant, position: None,
        seconds: Callable[[], float] = time.monotonic,
        most_traces: int | None = None,
    ) -> None:
        self._rules_at = rules_at
        self._store = store
        self._most_traces = most_traces
        self._behind = behind
        self._seconds = seconds
        self._log = log
        self._max_body = max_body_bytes
        self.recalled = 0
        """Traces reopened from the log."""
        self.partial = 0
        """Traces reopened without all of their earlier spans."""
        self.unknown = 0
        """Requested traces that are not in the index; mostly new ones."""

    def load(self, tenant: str, ids: Rows) -> Iterator[Recalled]:
        """Read traces (rows of hi, lo) in lazy rounds, so that only the spans of one round are in
        memory. Traces above the limits are returned as lost."""
        until = self._seconds() + MOST_SECONDS
        most = MOST_TRACES if self._most_traces is None else self._most_traces
        for at in range(0, min(len(ids), most), ROUND_TRACES):
            if at and self._seconds() >= until:
                break
            yield from self._round(tenant, ids[at : min(at + ROUND_TRACES, most)], until)
        else:
            at = most
        beyond = ids[at:]
        if len(beyond):
            self.partial += len(beyond)
            _log.warning(
                "%d late traces of %s are evaluated without their earlier spans: too many at once",
                len(beyond),
                tenant,
            )
            yield Recalled(ids[:0], [], None, beyond)

    def _round(self, tenant: str, ids: Rows, until: float) -> Iterator[Recalled]:
        """Read up to ``ROUND_TRACES`` traces; if they are long, until that time.

        Traces that are not in the index are new, unless the store is behind: then each may have
        earlier spans.
        """
        names = [f"{hi & _MASK:016x}{lo & _MASK:016x}" for hi, lo in ids.tolist()]
        try:
            behind = self._behind(tenant)  # first: what is written back after this is found
            found = self._store.find_traces(tenant, names)
            raised = self._store.raised_of(tenant, list(found)) if found else {}
        except (StoreError, PoolTimeout) as error:
            _log.warning("late spans of %s are evaluated without earlier spans: %s", tenant, error)
            self.partial += len(ids)
            yield Recalled(ids[:0], [], None, ids)
            return
        known = [k for k, name in enumerate(names) if name in found]
        self.unknown += len(ids) - len(known)
        if behind:
            lost = ids[[k for k, name in enumerate(names) if name not in found]]
            self.partial += len(lost)
            yield Recalled(ids[:0], [], None, lost)
        signals = {
            name: {(each[0], each[1]): rule_signals(*each[2:]) for each in its}
            for name, its in raised.items()
        }
        by_rules: dict[CompiledRules | None, list[int]] = {}
        for k in known:
            positions = found[names[k]].positions
            rules = self._rules_at(tenant, positions[0]) if positions else None
            by_rules.setdefault(rules, []).append(k)
        for rules, some in by_rules.items():
            rows = [found[names[k]] for k in some]
            batches = self._batches(tenant, rows, until)
            first = next(batches, None)
            if first is None:
                self.partial += len(some)
                yield Recalled(ids[:0], [], None, ids[some])
                continue
            whole: list[bool] = []
            rest = self._rest(ids[some], rows, behind, first, batches, whole)
            history = [signals.get(names[k], {}) for k in some]
            yield Recalled(ids[some], whole, first, ids[:0], history, rest, rules)

    def _rest(
        self,
        ids: Rows,
        rows: list[TraceRow],
        behind: bool,
        first: SpanBatch,
        batches: Iterator[SpanBatch],
        whole: list[bool],
    ) -> Iterator[SpanBatch]:
        """The batches after the first. After the last, sets which traces are ``whole``: all spans
        counted in their index rows were read."""
        read: list[list[Rows]] = [[] for _ in rows]
        for batch in chain([first], batches):
            _note_spans(batch, ids, read)
            if batch is not first:
                yield batch
        counts = [_distinct(each) for each in read]
        whole.extend(
            not (behind or row.partial) and n >= row.spans
            for n, row in zip(counts, rows, strict=True)
        )
        self.recalled += len(rows)
        self.partial += whole.count(False)

    def _batches(self, tenant: str, rows: list[TraceRow], until: float) -> Iterator[SpanBatch]:
        """The spans of the frames that contain the traces, in the order of their arrival; none if
        no frame can be read."""
        wanted = sorted({position for row in rows for position in row.positions})
        positions: list[int] = []
        frames: list[Frame] = []
        spans = total = 0
        for at in range(0, len(wanted), CHUNK_FRAMES):
            if total >= LEAST_SPANS and self._seconds() >= until:
                _log.warning("late traces of %s are too long to be read in time", tenant)
                break
            some = wanted[at : at + CHUNK_FRAMES]
            for position, frame in zip(some, self._log.read_many(tenant, some), strict=True):
                if not isinstance(frame, Frame):
                    continue
                if frames and spans + frame.spans > CHUNK_SPANS:
                    yield read_frames(tenant, positions, frames, self._max_body)
                    positions, frames, spans = [], [], 0
                positions.append(position)
                frames.append(frame)
                spans += frame.spans
                total += frame.spans
        if frames:
            yield read_frames(tenant, positions, frames, self._max_body)


def _note_spans(batch: SpanBatch, ids: Rows, read: list[list[Rows]]) -> None:
    """Add the ids of the traces' spans in a batch to ``read``."""
    rows = batch.spans[np.isin(batch.spans[:, TRACE_LO], ids[:, 1])]
    of = rows[:, [TRACE_HI, TRACE_LO]]
    for k, pair in enumerate(ids):
        found = rows[(of == pair).all(axis=1), SPAN_ID]
        if len(found):
            read[k].append(found)


def _distinct(parts: list[Rows]) -> int:
    """How many different numbers there are. NumPy's ``unique`` takes a second for 200 000."""
    if not parts:
        return 0
    numbers = np.sort(np.concatenate(parts))
    return 1 + int(np.count_nonzero(numbers[1:] != numbers[:-1]))
