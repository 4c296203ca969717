"""Folds and decides a section of the span log again, apart from the running service.

The clock is the log's: a trace is idle by the times at which requests were received. Memory is
bounded: if too many traces are open, those idle longest are closed. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from betrace.service.otlp.columns import TRACE_HI, TRACE_LO, Rows, SpanBatch
from betrace.service.pipeline.incomplete import mark_now
from betrace.service.pipeline.read_back import SPANS_MAX, ReadBack
from betrace.service.rules.compile import CompiledRules
from betrace.service.signals import Signal
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.due import DueTraces
from betrace.service.traces.eviction import idle_longest
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import FLAGS, REOPENED
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.tenant_traces import History, Recalled, TenantTraces
from betrace.service.traces.verdicts import decide_due
from betrace.service.traces.window import Windows

SECOND = 1_000_000_000
IDLE_NS = 60 * SECOND  # longer than the service's: the log has gaps while the service is down
BATCH_SPANS = 4000
BATCH_NS = SECOND // 4
KEPT_CLOSED = 10_000
KEPT_NS = 300 * SECOND
FILTER_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Stretch:
    """A section of a tenant's log: requests with ``since_ns`` <= received < ``until_ns``, and
    before position ``stop`` if given."""

    tenant: str
    since_ns: int | None = None
    until_ns: int | None = None
    stop: int | None = None


@dataclass(slots=True)
class Replay:
    """Folds a section of the log; :meth:`due` yields due traces in order.

    ``history`` reads traces that were closed and forgotten; without it, they are partial when a
    late span arrives. Counts grow while :meth:`due` runs.
    """

    log: SpanLog
    stretch: Stretch
    rules: CompiledRules
    max_body_bytes: int
    windows: Windows = field(default_factory=Windows)
    history: History | None = None
    idle_ns: int = IDLE_NS
    most_open: int = 1_000_000
    relational_spans_max: int = SPANS_MAX
    undecided: int = 0
    """Traces that rules could not judge, once for each rule."""
    frames: int = 0
    spans: int = 0
    traces: int = 0
    at_ns: int = 0
    """When the last folded request was received."""

    def due(self) -> Iterator[DueTraces]:
        """Early and closed traces; at the end of the section all are closed."""
        tenant = self.stretch.tenant
        traces = TenantTraces(tenant, self.rules, self.windows)
        closed = ClosedTraces(FILTER_BYTES)
        history = self.history or _nothing
        for batch in self._batches(self.stretch):
            now = self.at_ns = batch.received_ns
            yield from self._closed(traces.close_due(now, self.idle_ns))
            traces.evict(now, KEPT_NS, KEPT_CLOSED, closed)
            self.spans += len(batch)
            for table, folded in traces.fold(batch, now, closed, history):
                if folded.early is not None:
                    yield folded.early
                if len(folded.completed) or len(folded.spilled):
                    due = table.close(folded.completed, now)
                    due.spilled = folded.spilled
                    yield from self._closed([due])
            if traces.open_count > self.most_open:
                excess = traces.open_count - self.most_open
                over = idle_longest(traces.tables, excess)
                yield from self._closed([table.close(slots, now) for table, slots in over])
        yield from self._closed(traces.close_due(self.at_ns + 1, 0))

    def signals(self, now: int) -> Iterator[list[Signal]]:
        """The signals of due traces, with ``now`` as their ``detected_at``."""
        read_back = ReadBack(self.log, self.max_body_bytes, max_spans=self.relational_spans_max)
        relational = RelationalRules(read_back.traces)
        for due in self.due():
            read_back.note(due.tenant, due.spilled)
            decided = decide_due(due, now, relational)
            mark_now(decided, read_back)
            relational.note(due, decided.signals)
            self.undecided += len(decided.undecided)
            if decided.signals:
                yield decided.signals

    def over_the_edge(self, open_since_ns: int) -> set[str]:
        """Ids of traces that may have spans outside of the section, because spans were received
        just before or after it, or after ``open_since_ns`` if the section has no end."""
        found: set[str] = set()
        since, until = self.stretch.since_ns, self.stretch.until_ns
        edges: list[tuple[int, int | None]] = []
        if since is not None:
            edges.append((since - self.idle_ns, since))
        if until is not None:
            edges.append((until, until + self.idle_ns))
        else:
            edges.append((open_since_ns, None))
        for first, last in edges:
            for batch in self._batches(Stretch(self.stretch.tenant, first, last), count=False):
                ids = np.unique(batch.spans[:, [TRACE_HI, TRACE_LO]], axis=0)
                raw = ids.astype(">i8").tobytes()
                found.update(raw[at : at + 16].hex() for at in range(0, len(raw), 16))
        return found

    def _closed(self, due: list[DueTraces]) -> list[DueTraces]:
        for each in due:
            self.traces += int(np.count_nonzero(each.rows[:, FLAGS] & REOPENED == 0))
        return due

    def _batches(self, stretch: Stretch, count: bool = True) -> Iterator[SpanBatch]:
        positions: list[int] = []
        frames: list[Frame] = []
        spans = 0
        for position, frame in self.log.frames(
            stretch.tenant,
            stop=stretch.stop,
            since_ns=stretch.since_ns,
            until_ns=stretch.until_ns,
        ):
            full = spans + frame.spans > BATCH_SPANS
            if frames and (full or frame.received_ns - frames[0].received_ns > BATCH_NS):
                yield read_frames(stretch.tenant, positions, frames, self.max_body_bytes)
                positions, frames, spans = [], [], 0
            positions.append(position)
            frames.append(frame)
            spans += frame.spans
            self.frames += count
        if frames:
            yield read_frames(stretch.tenant, positions, frames, self.max_body_bytes)


def _nothing(tenant: str, ids: Rows) -> list[Recalled]:
    """A history that knows no traces."""
    return [Recalled(ids[:0], [], None, ids)]
