"""rule-evaluation: decide the traces that are due and pass on their signals."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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
from betrace.service.pipeline.progress import InFlight
from betrace.service.signals import Kind, Signal
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import FLAGS, HI, LO, ONCE_DIRTY
from betrace.service.traces.verdicts import Decided, decide_due

STAGE = "rule-evaluation"
EARLY_REMEMBERED = 100_000  # traces with early signals that have not closed yet
SMALL = 6400  # (traces + matches) x rules: a batch this small costs less than a thread call
FEW_SIGNALS = 16  # in a small batch; more take time, and the next batch may have more


@dataclass(slots=True)
class EvaluateCounts:
    """What the stage has done."""

    traces: int = 0
    """Traces decided, early decisions included."""
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
    ) -> None:
        self._threads = threads
        self._onward = onward
        self._in_flight = in_flight
        self._clock_ns = clock_ns
        self._breaker = breaker
        self._bury = bury
        self._latencies = latencies
        self._early: LRUCache[tuple[str, int, int], int] = LRUCache(EARLY_REMEMBERED)
        self._many = False  # signals in the last batch
        self.counts = EvaluateCounts()

    async def handle(self, batch: list[DueTraces]) -> None:
        """Decide a batch and pass on what must be stored."""
        try:
            found = await self._breaker.call(self._timed, batch)
        except (BreakerOpen, BreakerTimeout, ThreadTimeout) as error:
            await self._bury(STAGE, batch, error, 1)
            return
        onward = []
        for decided, traces in found:
            self.counts.traces += traces
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

    def forget(self, tenant: str) -> None:
        """Forget the traces of a tenant."""
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
        if not self._many and sum(map(_work, batch)) <= SMALL:
            found = self._decide(batch)  # a thread call would cost five times as much
        else:
            found = await self._threads.run(self._decide, batch, abandon_on_cancel=True)
        self._many = sum(len(decided.signals) for decided, _ in found) > FEW_SIGNALS
        self._latencies.evaluation.observe(time.perf_counter() - started)
        return found

    def _decide(self, batch: list[DueTraces]) -> list[tuple[Decided, int]]:
        now = self._clock_ns()
        return [(decide_due(due, now), len(due)) for due in batch]


def _work(due: DueTraces) -> int:
    return (len(due) + len(due.entries)) * len(due.rules.rules)


def _halves(trace_id: str) -> tuple[int, int]:
    """A trace id of 32 hex digits as the two integers that rows contain."""
    hi, lo = struct.unpack(">qq", bytes.fromhex(trace_id))
    return hi, lo
