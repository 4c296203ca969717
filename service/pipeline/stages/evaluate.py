"""rule-evaluation: decide the traces that are due and pass on their signals."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
from betrace.service.pipeline.dead_letters import Bury
from betrace.service.pipeline.incomplete import IncompleteTraces
from betrace.service.pipeline.progress import InFlight
from betrace.service.pipeline.read_back import ROUND_SPANS, ROUND_TRACES, ReadBack
from betrace.service.pipeline.rule_evaluations import RuleEvaluations
from betrace.service.signals import Kind, Signal
from betrace.service.storage.undecided import (
    UndecidedStore,
    UndecidedStoreError,
    UndecidedTrace,
)
from betrace.service.telemetry import events
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.decide import decide_or_ask
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import E_CHECK, FLAGS, HI, LO, ONCE_DIRTY, SPANS
from betrace.service.traces.relational import RelationalRules, Undecided
from betrace.service.traces.verdicts import Decided, decide_due

_log = logging.getLogger("service.evaluate")

STAGE = "rule-evaluation"
EARLY_REMEMBERED = 100_000  # traces with early signals that have not closed yet
SMALL = 6400  # (traces + matches) x rules: a batch this small costs less than a thread call
REPORT_SECONDS = 60  # between log lines about undecided traces
SHARE = 0.6  # of the time of a call, for reading traces back and judging them
MOST_SERIES = 2000  # of outcomes by rule, as metrics.max_rule_series
FEW_SIGNALS = 16  # in a small batch; more take time, and the next batch may have more


@dataclass(slots=True)
class EvaluateCounts:
    """What the stage has done."""

    traces: int = 0
    """Traces decided, early decisions included."""
    undecided: int = 0
    """Traces and rules that could not be judged."""
    early: int = 0
    """Signals raised before the trace was closed."""
    raised: int = 0
    retracted: int = 0
    by_severity: dict[tuple[str, str], int] = field(default_factory=dict)
    """Signals by (severity, kind)."""

    def add(self, signal: Signal) -> None:
        """Count one signal."""
        self.early += signal.early
        if signal.kind is Kind.RAISED:
            self.raised += 1
        else:
            self.retracted += 1
        key = (signal.severity, str(signal.kind))
        self.by_severity[key] = self.by_severity.get(key, 0) + 1


@dataclass(frozen=True, slots=True)
class JudgingStores:
    """What judging whole traces reads from and writes to."""

    read_back: ReadBack
    undecided: UndecidedStore


class EvaluateStage:
    """The handler of the rule-evaluation stage; ``clock_ns`` is the wall clock.

    If ``breaker`` is open or a call takes too long, ``bury`` keeps the batch as dead letters at
    once. Until they are retried, the result stored earlier stays valid: the signals that were
    raised early, or when the trace was closed before.
    """

    def __init__(
        self,
        threads: ThreadRunner,
        onward: SendChannel[Decided],
        in_flight: InFlight,
        clock_ns: Callable[[], int],
        breaker: Breaker,
        bury: Bury,
        latencies: Latencies,
        stores: JudgingStores,
    ) -> None:
        self._threads = threads
        self._onward = onward
        self._in_flight = in_flight
        self._clock_ns = clock_ns
        self._breaker = breaker
        self._bury = bury
        self._latencies = latencies
        self._read_back = read_back = stores.read_back
        self._undecided = stores.undecided
        self._relational = RelationalRules(
            read_back.traces, read_back.signals_of, breaker.settings.timeout * SHARE
        )
        self._incomplete = IncompleteTraces(threads, read_back)
        self._early: LRUCache[tuple[str, int, int], int] = LRUCache(EARLY_REMEMBERED)
        self._raised_early: LRUCache[str, None] = LRUCache(EARLY_REMEMBERED)  # by signal id
        self._many = False  # signals in the last batch
        self._unreported = 0  # undecided
        self._report_at = 0.0
        self.counts = EvaluateCounts()
        self.evaluations = RuleEvaluations(MOST_SERIES)
        """By rule; :mod:`betrace.service.pipeline.build` replaces it with one of the configured
        size."""

    async def handle(self, batch: list[DueTraces]) -> None:
        """Decide a batch and pass on what must be stored."""
        try:
            found = await self._decide_all(batch)
            for decided, _ in found:
                decided.signals = self._new(decided.signals)
            await self._incomplete.mark([decided for decided, _ in found])
        except (BreakerOpen, BreakerTimeout, ThreadTimeout) as error:
            await self._bury(STAGE, batch, error, 1)
            return
        onward = []
        for decided, traces in found:
            self.counts.traces += traces
            self._count_outcomes(decided)
            if decided.undecided:
                self._report(decided)
            for signal in decided.signals:
                self.counts.add(signal)
                if signal.early:
                    key = (signal.tenant, *_halves(signal.trace_id))
                    self._early.setdefault(key, signal.detected_at)
            if decided.closed is not None and self._early:
                self._observe_leads(decided.closed)
            if decided.signals or decided.closed is not None or decided.spilled is not None:
                onward.append(decided)
            else:
                self._in_flight.leave(decided.ticket)
        await self._onward.send_each(onward)

    def _new(self, signals: list[Signal]) -> list[Signal]:
        """The signals without those that were raised early, and are found again."""
        new = []
        for signal in signals:
            if signal.id not in self._raised_early:
                new.append(signal)
                if signal.early:
                    self._raised_early[signal.id] = None
        return new

    async def _decide_all(self, batch: list[DueTraces]) -> list[tuple[Decided, int]]:
        """Decide a batch. Traces that may have to be read back are decided in parts, because each
        call is bounded in time."""
        if not any(due.rules.read_back for due in batch):
            return await self._breaker.call(self._timed, batch)
        found: list[tuple[Decided, int]] = []
        for due in batch:
            parts = [(0, due)] if _is_one_part(due) else await self._threads.run(_parts, due)
            decided: Decided | None = None
            for first, part in parts:
                ((own, _),) = await self._breaker.call(self._timed, [part])
                decided = own if decided is None else _joined(decided, own, first)
            assert decided is not None
            if len(parts) > 1:
                decided.closed, decided.spilled = due, due.spilled
            found.append((decided, len(due)))
        for due, (decided, _) in zip(batch, found, strict=True):
            self._relational.note(due, decided.signals)
        return found

    def _count_outcomes(self, decided: Decided) -> None:
        if decided.closed is not None and decided.outcomes is not None:
            closed = decided.closed
            self.evaluations.add(closed.tenant, closed.rules, decided.outcomes, len(closed))
        decided.outcomes = None  # what follows does not need it

    def _report(self, decided: Decided) -> None:
        """Count the traces that could not be judged, and log them at most once a minute."""
        self.counts.undecided += len(decided.undecided)
        self._unreported += len(decided.undecided)
        now = time.monotonic()
        if decided.closed is not None and now >= self._report_at:
            example = decided.undecided[0]
            events.RULES_UNDECIDED(
                tenant=decided.tenant,
                rule=decided.closed.rules.rules[example.rule].id,
                trace=decided.closed.trace_id(example.trace),
                reason=example.reason,
                count=self._unreported,
            )
            self._unreported = 0
            self._report_at = now + REPORT_SECONDS

    def forget(self, tenant: str) -> None:
        """Forget the traces of a tenant."""
        self._relational.forget(tenant)
        for key in [key for key in self._early if key[0] == tenant]:
            self._early.pop(key, None)

    def _observe_leads(self, closed: DueTraces) -> None:
        """Observe how long before their close traces were signalled early."""
        dirty = closed.rows[closed.rows[:, FLAGS] & ONCE_DIRTY != 0]
        for hi, lo in dirty[:, [HI, LO]].tolist():  # many, but few have early signals
            key = (closed.tenant, hi, lo)
            if key in self._early:
                lead = closed.received_ns - self._early.pop(key)
                self._latencies.early_lead.observe(max(0, lead) / 1e9)

    async def _timed(self, batch: list[DueTraces]) -> list[tuple[Decided, int]]:
        started = time.perf_counter()
        reads = any(map(_reads, batch))
        if not self._many and not reads and sum(map(_work, batch)) <= SMALL:
            found = self._decide(batch)  # a thread call would cost five times as much
        else:
            found = await self._threads.run(self._decide, batch, abandon_on_cancel=True)
        self._many = sum(len(decided.signals) for decided, _ in found) > FEW_SIGNALS
        self._latencies.evaluation.observe(time.perf_counter() - started)
        return found

    def _decide(self, batch: list[DueTraces]) -> list[tuple[Decided, int]]:
        now = self._clock_ns()
        for due in batch:
            if due.spilled is not None:
                self._read_back.note(due.tenant, due.spilled)
        found = [(decide_due(due, now, self._relational), len(due)) for due in batch]
        for due, (decided, _) in zip(batch, found, strict=True):
            if decided.undecided:
                self._store_undecided(due, decided.undecided, now)
        return found

    def _store_undecided(self, due: DueTraces, undecided: list[Undecided], now: int) -> None:
        rules = due.rules.rules
        records = [
            UndecidedTrace(
                due.trace_id(each.trace),
                rules[each.rule].id,
                rules[each.rule].version,
                each.reason,
                now,
            )
            for each in undecided
        ]
        try:
            self._undecided.add(due.tenant, records)
        except UndecidedStoreError as error:
            _log.warning("undecided traces of %s are not recorded: %s", due.tenant, error)


def _reads(due: DueTraces) -> bool:
    """Whether files may have to be read or written: some of the traces read back, or recorded as
    undecided."""
    rules = due.rules
    if not due.closed:
        return bool(rules.early_rules)
    checks = len(rules.checks)
    undecided = checks < rules.counters and bool((due.entries[:, E_CHECK] >= checks).any())
    return undecided or bool(rules.read_back)


def _is_one_part(due: DueTraces) -> bool:
    """Whether the candidates are certainly few enough for one round."""
    few = len(due) <= ROUND_TRACES and int(due.rows[:, SPANS].sum()) <= ROUND_SPANS
    return few or not due.closed or not _reads(due)


def _parts(due: DueTraces) -> list[tuple[int, DueTraces]]:
    """Parts of closed traces, each with the number of its first trace. A part has the candidates
    that one round reads; the first one has what was spilled."""
    candidate = np.zeros(len(due), bool)
    candidate[[each.trace for each in decide_or_ask(due)[1]]] = True
    spans = np.cumsum(np.where(candidate, due.rows[:, SPANS], 0))
    traces = np.cumsum(candidate)
    if spans[-1] <= ROUND_SPANS and traces[-1] <= ROUND_TRACES:
        return [(0, due)]
    parts = []
    first = 0
    while first < len(due):
        before = (int(spans[first - 1]), int(traces[first - 1])) if first else (0, 0)
        last = min(
            int(np.searchsorted(spans, before[0] + ROUND_SPANS, "right")),
            int(np.searchsorted(traces, before[1] + ROUND_TRACES, "right")),
        )
        last = max(last, first + 1)
        part = due.part(first, last)
        if first == 0:
            part.spilled = due.spilled
        parts.append((first, part))
        first = last
    return parts


def _joined(decided: Decided, own: Decided, first: int) -> Decided:
    """The results of two parts; ``first`` is the number of the second part's first trace."""
    decided.signals += own.signals
    if decided.outcomes is not None and own.outcomes is not None:
        decided.outcomes += own.outcomes
    decided.missing |= {k + first: number for k, number in own.missing.items()}
    decided.undecided += [replace(each, trace=each.trace + first) for each in own.undecided]
    return decided


def _work(due: DueTraces) -> int:
    return (len(due) + len(due.entries)) * len(due.rules.rules)


def _halves(trace_id: str) -> tuple[int, int]:
    """A trace id of 32 hex digits as the two integers that rows contain."""
    hi, lo = struct.unpack(">qq", bytes.fromhex(trace_id))
    return hi, lo
