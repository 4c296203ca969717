"""rule-evaluation: decide what is due and make signals of the breaches."""

from __future__ import annotations

import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cachetools import LRUCache

from betrace.channels import (
    Breaker,
    BreakerOpen,
    BreakerTimeout,
    SendChannel,
    ThreadRunner,
    ThreadTimeout,
)
from betrace.service.otlp.columns import Rows
from betrace.service.pipeline.progress import InFlight
from betrace.service.signals import Kind, Signal, signal_id
from betrace.service.traces.decide import ALWAYS_BROKEN, CLAUSES, NEVER_BROKEN, Breach, decide
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    E_CHECK,
    E_COUNT,
    E_EVIDENCE,
    EVIDENCE,
    FLAGS,
    HI,
    LO,
    ONCE_DIRTY,
    PARTIAL,
    REOPENED,
)
from betrace.service.traces.signal_history import RuleVersion, active_elsewhere

STAGE = "rule-evaluation"
EARLY_REMEMBERED = 100_000  # traces with early signals whose close is waited for
SMALL = 6400  # traces and matches times rules, that are decided in less time than a thread takes
FEW_SIGNALS = 16  # in a small batch; more take time, and more may come
_MASK = 2**64 - 1
_CHANGED = "spans that came after the trace had closed changed the verdict"

Bury = Callable[[str, list[DueTraces], Exception, int], Awaitable[None]]
"""Keeps items that a stage failed on together: (stage, items, error, attempts)."""


@dataclass(slots=True, eq=False)
class Decided:
    """What is to be stored: signals, and the traces that were closed (None where none were)."""

    tenant: str
    signals: list[Signal]
    closed: DueTraces | None
    spilled: Rows | None = None
    due_ns: int = 0
    """When the last span that mattered was received, or the trace was closed."""

    ticket: int = 0
    """Of :class:`betrace.service.pipeline.progress.InFlight`."""

    @property
    def weight(self) -> int:
        """Rows to be written, at least 1."""
        traces = 0 if self.closed is None else len(self.closed)
        return len(self.signals) + traces or 1


@dataclass(slots=True)
class EvaluateCounts:
    """What the stage has done."""

    traces: int = 0
    """Decided, early ones too."""
    early: int = 0
    """Signals raised before the trace had closed."""
    raised: int = 0
    retracted: int = 0
    by_severity: dict[tuple[str, str], int] = field(default_factory=dict)
    """Signals by (severity, kind)."""


class EvaluateStage:
    """The handler of the rule-evaluation stage; ``clock_ns`` is the wall clock. ``observe_lead`` is
    told by how many seconds the first early signal of a trace came before its close, and
    ``observe_seconds`` how long deciding a batch took.

    While ``breaker`` is open, or where a call takes too long, ``bury`` keeps the batch as dead
    letters at once. Until they are tried again, the result that is stored already stands: the
    signals that were raised early, or when the trace was closed before.
    """

    def __init__(
        self,
        threads: ThreadRunner,
        onward: SendChannel[Decided],
        in_flight: InFlight,
        clock_ns: Callable[[], int],
        breaker: Breaker,
        bury: Bury,
        observe_lead: Callable[[float], None],
        observe_seconds: Callable[[float], None],
    ) -> None:
        self._threads = threads
        self._observe_seconds = observe_seconds
        self._observe_lead = observe_lead
        self._early: LRUCache[tuple[str, int, int], int] = LRUCache(EARLY_REMEMBERED)
        self._breaker = breaker
        self._bury = bury
        self._onward = onward
        self._in_flight = in_flight
        self._clock_ns = clock_ns
        self._many = False  # signals in the last batch
        self.counts = EvaluateCounts()

    async def handle(self, batch: list[DueTraces]) -> None:
        """Decide a batch and pass on what is to be stored."""
        counts = self.counts
        try:
            found = await self._breaker.call(self._timed, batch)
        except (BreakerOpen, BreakerTimeout, ThreadTimeout) as error:
            await self._bury(STAGE, batch, error, 1)
            return
        for decided, traces in found:
            counts.traces += traces
            for signal in decided.signals:
                if signal.early:
                    counts.early += 1
                    key = (signal.tenant, *_halves(signal.trace_id))
                    self._early.setdefault(key, signal.detected_at)
                if signal.kind is Kind.RAISED:
                    counts.raised += 1
                else:
                    counts.retracted += 1
                sort = (signal.severity, str(signal.kind))
                counts.by_severity[sort] = counts.by_severity.get(sort, 0) + 1
            if decided.closed is not None and self._early:
                self._note_leads(decided.closed)
            if decided.signals or decided.closed is not None or decided.spilled is not None:
                await self._onward.send(decided)
            else:
                self._in_flight.leave(decided.ticket)

    def forget(self, tenant: str) -> None:
        """Forget the traces of a tenant."""
        for key in [key for key in self._early if key[0] == tenant]:
            self._early.pop(key, None)

    def _note_leads(self, closed: DueTraces) -> None:
        """Observe how long before their close traces were signalled early."""
        dirty = closed.rows[closed.rows[:, FLAGS] & ONCE_DIRTY != 0]
        for hi, lo in dirty[:, [HI, LO]].tolist():  # many, of which few were signalled
            key = (closed.tenant, hi, lo)
            if key in self._early:
                lead = closed.received_ns - self._early.pop(key)
                self._observe_lead(max(0, lead) / 1e9)

    async def _timed(self, batch: list[DueTraces]) -> list[tuple[Decided, int]]:
        started = time.perf_counter()
        if not self._many and sum(map(_work, batch)) <= SMALL:
            found = self._decide(batch)  # to pass it to a thread would cost five times as much
        else:
            found = await self._threads.run(self._decide, batch, abandon_on_cancel=True)
        self._many = sum(len(decided.signals) for decided, _ in found) > FEW_SIGNALS
        self._observe_seconds(time.perf_counter() - started)
        return found

    def _decide(self, batch: list[DueTraces]) -> list[tuple[Decided, int]]:
        now = self._clock_ns()
        return [(decide_due(due, now), len(due)) for due in batch]


def _work(due: DueTraces) -> int:
    return (len(due) + len(due.entries)) * len(due.rules.rules)


def _halves(trace_id: str) -> tuple[int, int]:
    """The id of 32 hex digits, as rows have it."""
    hi, lo = struct.unpack(">qq", bytes.fromhex(trace_id))
    return hi, lo


def decide_due(due: DueTraces, now: int) -> Decided:
    """The signals of traces that are due; ``now`` becomes their ``detected_at``."""
    signals = [_signal(due, breach, now, kind, episode) for breach, kind, episode in _found(due)]
    spilled = due.spilled if due.spilled is not None and len(due.spilled) else None
    return Decided(
        due.tenant,
        signals,
        due if due.closed and len(due) else None,
        spilled,
        due.received_ns,
        due.ticket,
    )


def raise_signal(due: DueTraces, breach: Breach, now: int) -> Signal:
    """The signal of a breach that was never raised before."""
    return _signal(due, breach, now, Kind.RAISED, 0)


def _found(due: DueTraces) -> Iterator[tuple[Breach, Kind, int]]:
    """What is to be signalled, each with its episode. What stands and still holds is told again: it
    has its id, and is recorded where it was not yet."""
    breaches = decide(due)
    rules = due.rules.rules
    broken: dict[int, set[RuleVersion]] = {}  # by trace that was closed before
    if due.closed:
        again = np.flatnonzero(due.rows[:, FLAGS] & REOPENED).tolist()
        broken = {k: set() for k in [*again, *due.signal_history]}
    if broken:
        named = {(breach.trace, breach.rule) for breach in breaches}
        for breach in decide(due, raised_early=False):
            if (k := breach.trace) in broken:
                rule = rules[breach.rule]
                broken[k].add((rule.id, rule.version))
                before = due.signal_history.get(k, {}).get((rule.id, rule.version))
                if (k, breach.rule) not in named and not (before and before.active):
                    # Certain early, but perhaps not when it was folded: under other rules.
                    breaches.append(breach)
    elsewhere = {
        k: active_elsewhere(told, due.rules.identities) for k, told in due.signal_history.items()
    }
    for breach in breaches:
        rule = rules[breach.rule]
        if rule.id not in elsewhere.get(breach.trace, ()):
            before = due.signal_history.get(breach.trace, {}).get((rule.id, rule.version))
            yield breach, Kind.RAISED, before.emitted // 2 if before else 0
    for k, told in due.signal_history.items() if due.closed else ():
        for number, rule in enumerate(rules):
            before = told.get((rule.id, rule.version))
            if before and before.active and (rule.id, rule.version) not in broken[k]:
                clause = ALWAYS_BROKEN if before.clause == "always" else NEVER_BROKEN
                yield Breach(k, number, clause, early=False), Kind.RETRACTED, before.emitted // 2


def _signal(due: DueTraces, breach: Breach, now: int, kind: Kind, episode: int) -> Signal:
    rules = due.rules
    rule = rules.rules[breach.rule]
    trace_id = due.trace_id(breach.trace)
    first, last = due.starts[breach.trace], due.starts[breach.trace + 1]
    by_check = {int(row[E_CHECK]): row for row in due.entries[first:last]}
    counts: dict[str, int] = {}
    evidence: dict[str, list[str]] = {}
    for check in rules.checks_of_rule[breach.rule]:
        name = rules.check_names[check]
        row = by_check.get(check)
        counts[name] = 0 if row is None else int(row[E_COUNT])
        if row is not None:
            kept = min(counts[name], EVIDENCE)
            ids = row[E_EVIDENCE + 1 : E_EVIDENCE + 2 * kept : 2]
            evidence[name] = [f"{int(span_id) & _MASK:016x}" for span_id in ids]
    clause = CLAUSES[breach.clause]
    found = ", ".join(f"{name}: {count}" for name, count in counts.items())
    says = "does not hold" if clause == "always" else "holds"
    return Signal(
        id=signal_id(due.tenant, rule.id, rule.version, trace_id, kind, episode),
        tenant=due.tenant,
        rule_id=rule.id,
        rule_version=rule.version,
        severity=str(rule.severity),
        kind=kind,
        clause=clause,
        trace_id=trace_id,
        detected_at=now,
        early=breach.early,
        counts=counts,
        evidence=evidence,
        message=f"{rule.name}: {clause!r} {says} ({found})",
        labels=dict(rule.labels),
        reason=_CHANGED if kind is Kind.RETRACTED else _caveat(due, breach.trace),
        context=_context(due, breach.trace),
        episode=episode,
    )


def _caveat(due: DueTraces, k: int) -> str | None:
    if due.rows[k, FLAGS] & PARTIAL:
        return "the trace is partial: spans of it that came long before were not counted"
    return None


def _context(due: DueTraces, k: int) -> dict[str, Any] | None:
    context = due.contexts.get(k)
    if context is None:
        return None
    return {
        "window": context.window,
        "first": context.first,
        "last": context.first + len(context.spans) - 1,
        "spans": [f"{span_id & _MASK:016x}" for span_id in context.spans],
    }
