"""Decides the due traces of a partition.

Everything here depends on the log alone, never on the time that work takes. Log time bounds how
many open traces are read to judge rules that relate spans, and how many closed ones to be marked
as incomplete.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.log_pace import LogPace
from betrace.service.cluster.output import NotJudged
from betrace.service.pipeline.incomplete import mark_now
from betrace.service.pipeline.read_back import ReadBack
from betrace.service.signals import Kind, Signal
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import FIRST_SEEN, LAST_SEEN, LO, POSITION_COUNT
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.verdicts import Decided, decide_due

_log = logging.getLogger("service.cluster.decisions")

EARLY_REMEMBERED = 20_000  # signals
MARK_FRAME_NS = 10_000_000  # of log time, for each frame that is read to find missing parents
MARK_BURST_NS = 4_000_000_000


@dataclass(frozen=True, slots=True)
class LogMoment:
    """When something is decided: in log time, and at the server."""

    log_ns: int
    time_ns: int

    @property
    def ahead_ns(self) -> int:
        """How far the server's time is ahead of log time."""
        return self.time_ns - self.log_ns


class Decisions:
    """Decides due traces, and knows what was signalled before. Not thread-safe."""

    def __init__(self, read_back: ReadBack) -> None:
        self._read_back = read_back
        self._pace = LogPace()
        self._relational = RelationalRules(read_back.traces, pace=self._pace)
        self._early: dict[str, None] = {}  # ids of signals raised early, oldest first
        self._paid_ns = 0  # log time up to which reading for marks is used up
        self.failed = 0
        """Traces whose rules raised an unexpected error."""
        self.unmarked = 0
        """Items with signals for which there were too many frames to look for missing parents."""

    def decide(self, due: DueTraces, moment: LogMoment) -> tuple[Decided, list[NotJudged]]:
        """The signals of due traces, with times as people know them. Raises
        :exc:`~betrace.channels.TransientError` if the log cannot be read now; call it again
        then."""
        try:
            decided = self._decide(due, moment)
        except TransientError:
            raise
        except Exception:
            if len(due) > 1:
                return self._one_by_one(due, moment)
            _log.exception("the rules of a trace of %s cannot be evaluated", due.tenant)
            self.failed += len(due)
            closed = due if due.closed and len(due) else None
            decided = Decided(due.tenant, [], closed, due.spilled, due.received_ns)
        undecided = _records(due, decided, moment)
        decided.undecided, decided.outcomes = [], None
        if due.closed:
            _show_times(due, moment)
        decided.due_ns = due.received_ns
        return decided, undecided

    def _decide(self, due: DueTraces, moment: LogMoment) -> Decided:
        if due.rules.read_back and due.spilled is not None:
            self._read_back.note(due.tenant, due.spilled)
        self._pace.log_ns = moment.log_ns
        decided = decide_due(due, moment.time_ns, self._relational)
        decided.signals = self._new(due, decided.signals)
        self._mark(decided, moment.log_ns)
        if due.rules.read_back:
            self._relational.note(due, decided.signals)
        for signal in decided.signals:
            if signal.early:
                self._early[signal.id] = None
        while len(self._early) > EARLY_REMEMBERED:
            del self._early[next(iter(self._early))]
        return decided

    def _new(self, due: DueTraces, signals: list[Signal]) -> list[Signal]:
        """The signals without those that were raised before, early or when the trace was closed,
        and are found again."""
        active: set[tuple[str, str, str]] = set()
        histories = self._relational.histories(due)[0] if signals else {}
        for k, history in histories.items():
            trace_id = due.trace_id(k)
            active |= {(trace_id, *rule) for rule, known in history.items() if known.active}
        return [
            each
            for each in signals
            if each.id not in self._early
            and (
                each.kind is Kind.RETRACTED
                or (each.trace_id, each.rule_id, each.rule_version) not in active
            )
        ]

    def _mark(self, decided: Decided, log_ns: int) -> None:
        """Mark the signals of incomplete traces, unless too many frames were read for that."""
        wanted = {
            each.trace_id for each in decided.signals if each.kind is Kind.RAISED and not each.early
        }
        closed = decided.closed
        if closed is None or not wanted:
            return
        halves = np.array([int(trace_id[16:], 16) for trace_id in wanted], np.uint64)
        rows = closed.rows[np.isin(closed.rows[:, LO], halves.view(np.int64))]
        frames = int(rows[:, POSITION_COUNT].sum())
        paid_ns = max(self._paid_ns, log_ns - MARK_BURST_NS) + frames * MARK_FRAME_NS
        if paid_ns > log_ns:
            self.unmarked += 1
            return
        mark_now(decided, self._read_back)
        self._paid_ns = paid_ns

    def _one_by_one(self, due: DueTraces, moment: LogMoment) -> tuple[Decided, list[NotJudged]]:
        """Decide each trace by itself, because the rules of one of them fail."""
        whole = Decided(due.tenant, [], due if due.closed else None, due.spilled)
        undecided: list[NotJudged] = []
        for k in range(len(due)):
            part = due.part(k, k + 1)
            part.rows = part.rows.copy()
            decided, more = self.decide(part, moment)
            whole.signals += decided.signals
            undecided += more
        if due.closed:
            _show_times(due, moment)
        whole.due_ns = due.received_ns
        return whole, undecided

    def forget(self, tenant: str) -> None:
        """Forget the signals of a tenant, because it was deleted. Those that were raised early are
        forgotten in time."""
        self._relational.forget(tenant)

    def saved(self) -> dict[str, Any]:
        """What is known, as JSON, for a snapshot."""
        return {
            "early": list(self._early),
            "relational": self._relational.saved(),
            "early_reading": self._pace.saved(),
            "spilled": self._read_back.saved(),
            "paid_ns": self._paid_ns,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`saved` returned."""
        self._early = dict.fromkeys(saved["early"])
        self._relational.restore(saved["relational"])
        if "early_reading" in saved:  # not in snapshots of version 0.3.0
            self._pace.restore(saved["early_reading"])
        self._read_back.restore(saved["spilled"])
        self._paid_ns = saved["paid_ns"]


def _show_times(due: DueTraces, moment: LogMoment) -> None:
    """Turn the log times of closed traces into times as people know them."""
    due.rows[:, [FIRST_SEEN, LAST_SEEN]] += moment.ahead_ns
    due.received_ns += moment.ahead_ns


def _records(due: DueTraces, decided: Decided, moment: LogMoment) -> list[NotJudged]:
    rules = due.rules.rules
    return [
        NotJudged(
            due.tenant,
            UndecidedTrace(
                due.trace_id(each.trace),
                rules[each.rule].id,
                rules[each.rule].version,
                each.reason,
                moment.time_ns,
            ),
        )
        for each in decided.undecided
    ]
