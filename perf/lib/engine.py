"""The path of a span without HTTP, on one thread of this process: decode, fold, close, decide, rows
of the trace index. Costs are CPU time of the thread. Other processes that take the core do not
change it, although those that use the CPU's caches do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from betrace.service.otlp.columns import FLAGS, HAS_PARENT, SPAN_ID, TRACE_HI, TRACE_LO, SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import ENTRIES_USED, LARGE_USED, MIDDLE_USED, SLOTS_USED
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from perf.lib.workload import Shape, make_bodies, rule_definitions

SECOND = 1_000_000_000
BATCH = 512
TENANT = "perf"
_SPREAD = np.uint64(0x9E3779B97F4A7C15)

Numbers = npt.NDArray[np.int64]


def compiled(count: int) -> CompiledRules:
    """Return the workload's rules, compiled."""
    return compile_rules([make_rule(d) for d in rule_definitions(count)], f"perf-{count}")


def spread_ids(numbers: Numbers) -> Numbers:
    """Return distinct ids that look random."""
    return (numbers.astype(np.uint64) * _SPREAD).view(np.int64)


@dataclass(slots=True)
class Cost:
    """CPU nanoseconds by step, and the number of spans, traces and signals."""

    decode: int = 0
    fold: int = 0
    close: int = 0  # close, decide, and the rows of the trace index
    spans: int = 0
    traces: int = 0
    signals: int = 0

    @property
    def path(self) -> float:
        """Nanoseconds a span for all steps."""
        return (self.decode + self.fold + self.close) / self.spans

    @property
    def folding(self) -> float:
        """Nanoseconds a span for the fold alone."""
        return self.fold / self.spans


class Feed:
    """Batches of ``BATCH`` spans. The caller chooses each span's trace; everything else is the load
    test's workload."""

    def __init__(self, rules: int = 100) -> None:
        bodies = make_bodies(Shape(spans=BATCH, rules=rules), 16)
        self._bodies = [bytes(body.data) for body in bodies]
        self._sent = 0

    def batch(self, traces: Numbers, first: npt.NDArray[np.bool_], cost: Cost) -> SpanBatch:
        """Decode and return a batch whose span *i* belongs to trace number ``traces[i]``, as its
        root if ``first[i]``."""
        body = self._bodies[self._sent % len(self._bodies)]
        began = time.thread_time_ns()
        batch = scan_bodies(TENANT, [body])
        cost.decode += time.thread_time_ns() - began
        spans = batch.spans
        spans[:, TRACE_HI] = spread_ids(traces + 1)
        spans[:, TRACE_LO] = spread_ids(traces + (1 << 40))
        spans[:, SPAN_ID] = np.arange(BATCH) + self._sent * BATCH + 1
        spans[:, FLAGS] = np.where(first, 0, HAS_PARENT)
        self._sent += 1
        batch.positions = np.array([self._sent], np.int64)
        return batch


class Engine:
    """A tenant's traces, and the cost of folding into them."""

    def __init__(self, rules: CompiledRules, feed: Feed) -> None:
        self.traces = TenantTraces(TENANT, rules)
        self._closed = ClosedTraces(1 << 20)
        self._feed = feed
        self.now = SECOND
        self.cost = Cost()

    def fold(self, numbers: Numbers, first: npt.NDArray[np.bool_]) -> None:
        """Fold a batch, see :meth:`Feed.batch`."""
        cost = self.cost
        batch = self._feed.batch(numbers, first, cost)
        self.now += 1_000_000
        began = time.thread_time_ns()
        due = [f.early for _, f in self.traces.fold(batch, self.now, self._closed) if f.early]
        cost.fold += time.thread_time_ns() - began
        cost.spans += len(batch)
        self._decide(due, index=False)

    def bytes_in_use(self) -> int:
        """Return the memory that open traces use in the arrays: rows and hash table slots. The rest
        is spare capacity."""
        total = 0
        for table in self.traces.tables:
            arrays, fill = table.arrays, table.arrays.fill
            slots, middle, large, entries = (
                int(fill[used]) for used in (SLOTS_USED, MIDDLE_USED, LARGE_USED, ENTRIES_USED)
            )
            for rows, used in (
                *((a, slots) for a in (arrays.slots, arrays.activity, arrays.names)),
                (arrays.ring_small, slots),
                (arrays.table, 2 * slots),
                (arrays.ring_middle, middle),
                (arrays.ring_large, large),
                (arrays.chains, large),
                (arrays.entries, entries),
            ):
                total += used * (rows.nbytes // len(rows))
            total += arrays.ids.nbytes
        return total

    def close(self) -> None:
        """Close and forget all traces."""
        self.now += 10 * SECOND
        began = time.thread_time_ns()
        due = self.traces.close_due(self.now, SECOND)
        self.cost.close += time.thread_time_ns() - began
        self._decide(due, index=True)
        self.now += 3600 * SECOND
        self.traces.evict(self.now, SECOND, 0, self._closed)

    def _decide(self, due: list[DueTraces], *, index: bool) -> None:
        began = time.thread_time_ns()
        for traces in due:
            self.cost.signals += len(decide_due(traces, self.now).signals)
            if index:
                trace_table(traces)
        self.cost.close += time.thread_time_ns() - began
        if index:
            self.cost.traces += sum(len(traces) for traces in due)


def one_after_another(
    spans_per_trace: int, batches: int, first_trace: int = 0
) -> Iterator[tuple[Numbers, npt.NDArray[np.bool_]]]:
    """Fold traces one after another, each in as many batches as it needs."""
    for i in range(batches):
        number = np.arange(i * BATCH, (i + 1) * BATCH)
        yield first_trace + number // spans_per_trace, number % spans_per_trace == 0


def interleaved(
    open_traces: int, rounds: int, first_trace: int = 0, seed: int = 1
) -> Iterator[tuple[Numbers, npt.NDArray[np.bool_]]]:
    """Fold a span of each of ``open_traces`` in random order, ``rounds`` times, each in another
    order (a last batch that is not full is left out)."""
    rng = np.random.default_rng(seed)
    rest = np.zeros(0, np.int64)
    seen = np.zeros(open_traces, bool)
    for _ in range(rounds):
        rest = np.concatenate([rest, rng.permutation(open_traces)])
        while len(rest) >= BATCH:
            batch, rest = rest[:BATCH], rest[BATCH:]
            first = ~seen[batch]
            if open_traces < BATCH:  # a trace may be in the batch twice
                first &= np.isin(np.arange(BATCH), np.unique(batch, return_index=True)[1])
            seen[batch] = True
            yield first_trace + batch, first
