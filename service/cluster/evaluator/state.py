"""The state of a partition: a function of the prefix of its log ``SPANS_p``.

Work is done in *steps*, which are numbered: folding a group of messages, and closing the traces
that are due at a boundary of log time. Where groups end depends on the log alone, so a successor
that starts from any snapshot decides the same, in the same steps. A group ends

- before a message that crosses a boundary of log time, and before a marker of rules,
- after a message that has no spans, that comes after a pause, or that makes the group full.

Messages of a group that has not ended yet are *received* but not *applied*. A tick ends a group, so
an owner that wants results soon appends one.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from betrace.service.cluster.evaluator import snapshot as snapshots
from betrace.service.cluster.evaluator.decisions import Decisions, LogMoment
from betrace.service.cluster.evaluator.engine import PartitionEngine, Results
from betrace.service.cluster.evaluator.group import MessageGroup, opened
from betrace.service.cluster.evaluator.late import IndexAtMessage
from betrace.service.cluster.evaluator.log_time import BOUNDARY_NS, CLOSE_EVERY, LogTime
from betrace.service.cluster.evaluator.partition_traces import (
    INDEX_LAG_NS,
    PartitionTraces,
    Wanted,
    partition_limits,
)
from betrace.service.cluster.evaluator.progress import StoredSteps
from betrace.service.cluster.evaluator.raised import KnownOutput
from betrace.service.cluster.evaluator.rules import RulesInForce
from betrace.service.cluster.evaluator.snapshot import PartitionSnapshot
from betrace.service.cluster.output import Counts, Output
from betrace.service.cluster.tenant_entries import GONE
from betrace.service.config.settings import Settings
from betrace.service.otlp.columns import Rows
from betrace.service.pipeline.history import TraceHistory, TraceIndex
from betrace.service.pipeline.open_traces import NotNow
from betrace.service.pipeline.read_back import ReadBack
from betrace.service.storage.jetstream.envelope import RulesMarker, Seal, Spans
from betrace.service.storage.jetstream.layout import pack_log_position
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.traces.due import DueTraces

PAUSE_NS = 100_000_000
"""A message after such a pause is folded at once: there are few, so results need not wait."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """The message up to which a snapshot goes: a log that lost its tail has another one there."""

    sequence: int
    time_ns: int
    digest: str

    @classmethod
    def of(cls, message: LogMessage) -> Anchor:
        """The anchor of a message."""
        digest = hashlib.blake2b(message.data, digest_size=16).hexdigest()
        return cls(message.sequence, message.time_ns, digest)


class PartitionState:
    """Not thread-safe: one call at a time, in a worker thread.

    Order of calls: :meth:`restore` if there is a snapshot, or else :meth:`inherit` if the partition
    continues another one; :meth:`note` for each message of ``OUT_p`` after the snapshot's
    ``out_sequence``; :meth:`begin` if the state is still :attr:`empty`; then
    :meth:`apply` with the messages after :attr:`received`, as they come; :meth:`stored` whenever an
    output is stored in ``OUT_p``.

    Args:
      partitions: how many there are; the limits in the settings are shared between them.
      log: reads frames by position.
      index: the stored traces. It must have ``OUT_p`` applied up to :attr:`index_sequence`, or
        raise :exc:`~betrace.service.pipeline.history.HistoryUnavailable`.
    """

    def __init__(
        self,
        partition: int,
        partitions: int,
        settings: Settings,
        log: PartitionLog,
        index: TraceIndex,
    ) -> None:
        self.partition = partition
        self.applied = 0
        """The last sequence that is part of the state."""
        self.received = 0
        """The last sequence given to :meth:`apply`; the next call continues after it."""
        self.step = 0
        """The number of the last step."""
        self.waiting: str | None = None
        """Why the last call of :meth:`apply` stopped before the end: the index or the log cannot
        be read now. Call it again a little later, also without messages. Until then there is no
        snapshot."""
        self.sealed = False
        """Whether the log has ended: later messages belong to the partitions that continue it."""
        self.empty = True
        """Whether nothing was applied, restored or inherited."""
        self.inherited_output: tuple[int, int] | None = None
        """The parent, and the sequence of its output that the index must have applied, as long as
        this partition has no output of its own."""
        max_body = settings.ingest.max_body_bytes
        self._index = IndexAtMessage(index, self._position, self._missing)
        rules = RulesInForce()
        history = TraceHistory(
            self._index,
            log,
            max_body,
            rules_at=rules.at,
            seconds=lambda: 0.0,
            most_traces=1 << 62,
        )
        traces = PartitionTraces(
            partition_limits(settings, partitions),
            settings.traces.late_filter_bytes // partitions,
            rules.compiled,
            history.load,
        )
        read_back = ReadBack(log, max_body, max_spans=settings.traces.relational_spans_max)
        self.engine = PartitionEngine(partition, rules, traces, Decisions(read_back))
        self._time = LogTime()
        self._applied_time = self._time.saved()
        self._boundary = 0  # number of the last one at which traces were closed
        self._group = MessageGroup()
        self._queue: deque[LogMessage] = deque()
        self._work: Generator[str, None, None] | None = None  # of a message
        self._anchor = Anchor(0, 0, "")
        self._last: LogMessage | None = None  # applied since the start
        self._known = KnownOutput()
        self._steps = StoredSteps(INDEX_LAG_NS)
        self._out_sequence = 0  # of the snapshot that was restored
        self._output: Output | None = None
        self._broken: Exception | None = None

    @property
    def log_time_ns(self) -> int:
        """Log time of the last message received."""
        return self._time.now_ns

    @property
    def at_rest(self) -> bool:
        """Whether a tick would change nothing: no trace is open, and no message waits."""
        waits = self._work is not None or self._queue or self._group.messages
        if self.sealed:
            return True
        return not waits and not self.engine.traces.open_count

    @property
    def counts(self) -> Counts:
        """What became of the messages applied."""
        return self.engine.counts

    @property
    def rules_revisions(self) -> dict[str, int]:
        """By tenant, the revision of the rules in force."""
        return self.engine.rules.revisions

    @property
    def index_sequence(self) -> int:
        """The sequence of ``OUT_p`` that the index must have applied before it answers."""
        return self._steps.sequence

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of a trace in memory, for people. May be called from any thread."""
        return self.engine.traces.look_up(tenant, trace_id)

    def begin(self, rules: Iterable[RulesMarker]) -> None:
        """Begin with these rules, whose markers are still to be applied. For an empty state, before
        anything is applied."""
        for marker in rules:
            if marker.tenant.startswith(GONE):
                continue  # what was sent before the deletion is evaluated up to its marker
            self.engine.rules.begin(marker.tenant, marker.revision, marker.definitions)

    def apply(self, messages: Sequence[LogMessage]) -> Output | None:
        """Apply the next messages. Returns what was decided, None if no step was completed.

        Raises ValueError if a message is missing. After any other error the state cannot be used
        any more."""
        for message in messages:
            if self.received and message.sequence != self.received + 1:
                raise ValueError(
                    f"message {message.sequence} of partition {self.partition} does not follow "
                    f"{self.received}; read the log again from there"
                )
            self.received = message.sequence
            self._queue.append(message)
        if self._broken is not None:
            raise RuntimeError("an earlier error left this state incomplete") from self._broken
        try:
            self._run()
        except Exception as error:
            self._broken = error
            raise
        output, self._output = self._output, None
        return output

    def _run(self) -> None:
        self.waiting = None
        while self._work is not None or self._queue:
            if self.sealed:
                self._queue.clear()
                return
            if self._work is None:
                self._work = self._take(self._queue.popleft())
            self.waiting = next(self._work, None)
            if self.waiting is not None:
                return
            self._work = None

    def _take(self, message: LogMessage) -> Generator[str, None, None]:
        """The work of one message. Yields why it has to wait."""
        if not self._time.server_ns:
            self._begin(message)
        content = opened(message)
        now_ns = self._time.of(message.time_ns)
        boundary = now_ns // BOUNDARY_NS
        crosses = boundary > self._boundary
        if self._group.messages and (crosses or isinstance(content, RulesMarker)):
            yield from self._end_group()
        if crosses:
            moment, found = LogMoment(now_ns, message.time_ns), Results()
            closing = boundary // CLOSE_EVERY
            closes = closing > self._boundary // CLOSE_EVERY
            self._boundary = boundary
            if closes:
                found = yield from self.engine.close(closing * CLOSE_EVERY * BOUNDARY_NS, moment)
            self._finish(found, moment)
        paused = self._time.advance(message.time_ns) >= PAUSE_NS
        self._group.add(message, content)
        if paused or self._group.full or not isinstance(content, Spans):
            yield from self._end_group()

    def _begin(self, message: LogMessage) -> None:
        """Begin with the first message of the log."""
        secret = hashlib.blake2b(message.data, digest_size=16, key=b"%d" % message.time_ns)
        self.engine.traces.seed(secret.digest())
        self._boundary = message.time_ns // BOUNDARY_NS

    def _end_group(self) -> Generator[str, None, None]:
        group, self._group = self._group, MessageGroup()
        moment = LogMoment(self._time.now_ns, group.last.time_ns)
        found = yield from self.engine.fold(group, moment)
        self.applied, self._last = group.last.sequence, group.last
        self.empty = False
        self._applied_time = self._time.saved()
        self._finish(found, moment)
        self.sealed = isinstance(group.content, Seal)

    def _finish(self, found: Results, moment: LogMoment) -> None:
        """Complete a step."""
        self.step += 1
        self._steps.taken(self.step, moment.log_ns)
        for decided in found.decided:
            self._index.made(decided.signals)
        known = self._known
        new = known.new(self.step, found.decided)
        if self.step > known.step or new:
            output = Output(
                max(self.applied, known.upto),
                max(self.step, known.step),
                moment.log_ns,
                moment.time_ns,
                replace(self.counts),
                new,
                found.dead,
                found.undecided,
            )
            if self._output is None:
                self._output = output
            else:
                self._output.add(output)
        left = self._known.left_over(self.step)
        if left is not None:
            self._index.clear()
            rules = self.engine.rules
            self.engine.traces.reconsider(each for each in left if rules.is_current(each.tenant))

    def _position(self) -> int:
        return pack_log_position(self.partition, self.applied)

    def _missing(self) -> str | None:
        return self._steps.missing()

    # Taking over

    def note(self, output: Output, sequence: int) -> None:
        """Note a message of ``OUT_p`` beyond the snapshot, in order, before anything is applied."""
        signals = self._known.note(output, self.step)
        self._index.expect(signals)
        self._steps.begin(output.step if output.complete else 0, sequence)

    def stored(self, step: int, sequence: int) -> None:
        """Note that the outputs up to a step are stored in ``OUT_p``, up to a sequence of it."""
        self._known.stored(step)
        self._steps.stored(step, sequence)

    def snapshot(self, out_sequence: int) -> bytes:
        """The state up to :attr:`applied` and :attr:`step`.

        It may be used (published) only once all outputs up to this step are stored.
        ``out_sequence`` is the last message of ``OUT_p`` known to be stored now; a successor notes
        those after it. Raises :exc:`~betrace.service.pipeline.open_traces.NotNow` while
        :attr:`waiting`.
        """
        if self._work is not None or self._broken is not None:
            raise NotNow(self.waiting or "an error left the state incomplete")
        if self._known.is_ahead(self.step):  # what was noted must be noted again
            out_sequence = self._out_sequence
        anchor = self._anchor if self._last is None else Anchor.of(self._last)
        engine = self.engine
        traces, filters, rest = engine.traces.saved()
        header = {
            "partition": self.partition,
            "anchor": asdict(anchor),
            "applied": self.applied,
            "step": self.step,
            "out_sequence": out_sequence,
            "time": self._applied_time,
            "boundary": self._boundary,
            "sealed": self.sealed,
            "counts": asdict(self.counts),
            "rules": engine.rules.saved(),
            "decisions": engine.decisions.saved(),
            "unstored": self._known.saved(),
            "traces": rest,
        }
        return snapshots.encode(PartitionSnapshot(header, traces, filters))

    def restore(self, data: bytes) -> tuple[Anchor, int]:
        """Continue from a snapshot, before anything is noted or applied. Returns its anchor and its
        ``out_sequence``. Raises ValueError if it cannot be used; make a new state then."""
        found = snapshots.decode(data)
        header, engine = found.header, self.engine
        try:
            if header["partition"] != self.partition:
                raise ValueError(f"the snapshot is of partition {header['partition']}")
            engine.traces.restore(found.traces, found.filters, header["traces"])
            before = pack_log_position(self.partition, 0) if found.rules_by_sequence else 0
            engine.rules.restore(header["rules"], before)
            engine.rules.adopt(engine.traces.rules_in_use())
            engine.decisions.restore(header["decisions"])
            engine.counts = Counts(**header["counts"])
            self._anchor = Anchor(**header["anchor"])
        except (LookupError, TypeError) as error:
            raise ValueError(f"the snapshot is damaged: {error}") from error
        self.applied = self.received = header["applied"]
        self.step = header["step"]
        self._time.restore(header["time"])
        self._applied_time = header["time"]
        self._boundary = header["boundary"]
        self.sealed, self.empty = header.get("sealed", False), False
        engine.traces.recalled = engine.counts.recalled
        self._out_sequence = header["out_sequence"]
        self._known.restore(header["unstored"], self.step)
        self._steps.begin(self.step, header["out_sequence"])
        return self._anchor, header["out_sequence"]

    def inherit(self, data: bytes, wanted: Callable[[str, Rows], Wanted]) -> None:
        """Begin where a partition that this one continues has ended: ``data`` is its snapshot after
        the seal, and ``wanted`` says which of its traces belong here. Raises ValueError if it
        cannot be used; make a new state then."""
        found = snapshots.decode(data)
        header, engine = found.header, self.engine
        try:
            if not header["sealed"]:
                raise ValueError("the snapshot is not that of a finished partition")
            engine.traces.restore(found.traces, found.filters, header["traces"])
            engine.traces.keep(wanted)
            engine.rules.restore(header["rules"])
            engine.rules.adopt(engine.traces.rules_in_use())
            engine.decisions.restore(header["decisions"])
            self._time.inherit(header["time"])
            self._boundary = header["boundary"]
            self.inherited_output = header["partition"], header["out_sequence"]
        except (LookupError, TypeError) as error:
            raise ValueError(f"the snapshot is damaged: {error}") from error
        self._applied_time = self._time.saved()
        self.empty = False
