"""Folds groups of messages, closes traces and decides them, in steps that can be interrupted.

The index and the log are read while this happens. If one of them cannot be read now, a step yields,
and continues there when it is resumed: nothing is decided from parts of a trace because of that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.decisions import Decisions, LogMoment
from betrace.service.cluster.evaluator.group import MessageGroup, bad_frames, scanned
from betrace.service.cluster.evaluator.partition_traces import PartitionTraces
from betrace.service.cluster.evaluator.rules import RulesInForce
from betrace.service.cluster.output import Counts, DeadMessage, NotJudged
from betrace.service.cluster.tenant_entries import GONE
from betrace.service.otlp.columns import SpanBatch
from betrace.service.storage.jetstream.envelope import RulesMarker, Tick
from betrace.service.storage.jetstream.layout import pack_log_position
from betrace.service.tenants import log_name, split_log_name
from betrace.service.traces.due import DueTraces
from betrace.service.traces.verdicts import Decided

_log = logging.getLogger("service.cluster.engine")

ATTEMPTS = 3  # of a fold that fails


@dataclass(slots=True)
class Results:
    """What a step decided."""

    decided: list[Decided] = field(default_factory=list)
    undecided: list[NotJudged] = field(default_factory=list)
    dead: list[DeadMessage] = field(default_factory=list)


Steps = Generator[str, None, Results]
"""Yields why it has to wait."""


class PartitionEngine:
    """The traces, rules and decisions of a partition."""

    def __init__(
        self, partition: int, rules: RulesInForce, traces: PartitionTraces, decisions: Decisions
    ) -> None:
        self._partition = partition
        self.rules = rules
        self.traces = traces
        self.decisions = decisions
        self.counts = Counts()

    def close(self, boundary_ns: int, moment: LogMoment) -> Steps:
        """Close what is due at a boundary of log time."""
        self.traces.now_ns = boundary_ns
        due: list[DueTraces] = []
        _repeated(lambda: self.traces.close(due))
        found = Results()
        yield from self._decide(due, moment, found)
        return found

    def fold(self, group: MessageGroup, moment: LogMoment) -> Steps:
        """Apply the messages of a group."""
        self.traces.now_ns = moment.log_ns
        self.traces.ahead_ns = moment.ahead_ns
        found = Results(dead=group.dead)
        if isinstance(group.content, RulesMarker):
            self._change_rules(group, group.content, found)
        self._note_generations(group)
        spans = 0
        for batch in group.batches(self._partition):
            spans += len(batch)
            if not self.rules.is_current(batch.tenant):
                self.counts.deleted_spans += len(batch)
                continue
            yield from self._fold_tenant(batch, group, found)
        due: list[DueTraces] = []
        _repeated(lambda: self.traces.take_due(due))
        yield from self._decide(due, moment, found)
        self._count(group, spans, found)
        return found

    def _count(self, group: MessageGroup, spans: int, found: Results) -> None:
        counts = self.counts
        failed = len({each.sequence for each in found.dead})
        counts.dead_lettered += failed
        counts.evaluated += len(group.messages) - failed
        counts.frames += len(group.frames)
        counts.spans += spans
        counts.ticks += isinstance(group.content, Tick)
        counts.markers += isinstance(group.content, RulesMarker)
        counts.recalled = self.traces.recalled

    def _change_rules(self, group: MessageGroup, marker: RulesMarker, found: Results) -> None:
        sequence = group.last.sequence
        position = pack_log_position(self._partition, sequence)
        if marker.tenant.startswith(GONE):
            self._delete(marker.tenant.removeprefix(GONE), marker.revision, position)
            return
        problems = self.rules.change(marker.tenant, marker.revision, marker.definitions, position)
        self.counts.bad_rules += len(problems)
        for problem in problems:
            _log.error("a rule of %s cannot be used: %s", marker.tenant, problem)
            found.dead.append(DeadMessage(sequence, marker.tenant, problem))

    def _note_generations(self, group: MessageGroup) -> None:
        """Note tenants that were deleted and created again, if their new spans come before the
        marker that says so."""
        for message, frame in group.frames:
            tenant, generation = split_log_name(frame.tenant)
            if generation > self.rules.generation(tenant):
                position = pack_log_position(self._partition, message.sequence)
                self._delete(tenant, generation, position)

    def _delete(self, tenant: str, generation: int, position: int) -> None:
        """Forget everything of a tenant from before its deletion."""
        former = log_name(tenant, self.rules.generation(tenant))
        if self.rules.delete(tenant, generation, position):
            self.traces.forget(former)
            self.decisions.forget(former)

    def _fold_tenant(
        self, batch: SpanBatch, group: MessageGroup, found: Results
    ) -> Generator[str, None, None]:
        """Fold the spans of a tenant; if that fails for good, without the frames that fail."""
        for number in bad_frames(batch):
            sequence = group.frames_of(batch.tenant)[number][0].sequence
            self._bury(sequence, batch.tenant, "the spans are invalid protobuf", found)
        error = yield from self._try_fold(batch)
        for frame in group.frames_of(batch.tenant) if error is not None else ():
            error = yield from self._try_fold(scanned(self._partition, batch.tenant, [frame]))
            if error is not None:
                _log.error("message %d cannot be folded", frame[0].sequence, exc_info=error)
                self._bury(frame[0].sequence, batch.tenant, repr(error), found)

    def _bury(self, sequence: int, tenant: str, reason: str, found: Results) -> None:
        found.dead.append(DeadMessage(sequence, tenant, reason))
        self.counts.dead_frames += 1

    def _try_fold(self, batch: SpanBatch) -> Generator[str, None, Exception | None]:
        """Fold a batch. Returns why it fails again and again, or None."""
        attempts = 0
        while True:
            try:
                self.traces.fold(batch)
                return None
            except TransientError as error:
                yield str(error)
            except Exception as error:
                attempts += 1
                if attempts == ATTEMPTS:
                    return error

    def _decide(
        self, due: list[DueTraces], moment: LogMoment, found: Results
    ) -> Generator[str, None, None]:
        for each in due:
            while True:
                try:
                    decided, undecided = self.decisions.decide(each, moment)
                    break
                except TransientError as error:
                    yield str(error)
            found.undecided += undecided
            if decided.signals or decided.closed is not None or decided.spilled is not None:
                found.decided.append(decided)


def _repeated(work: Callable[[], object]) -> None:
    """Do something that continues where it failed."""
    for _ in range(ATTEMPTS - 1):
        try:
            work()
        except Exception:
            _log.exception("the traces cannot be closed; trying again")
        else:
            return
    work()
