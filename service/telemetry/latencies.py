"""Latencies: as histograms for Prometheus, and over the recent window for the API.

They are observed once per batch or signal, never per span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio
from prometheus_client import CollectorRegistry, Histogram

from betrace.service.telemetry.window import Recent

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TIMER_SECONDS = 0.1  # 10 wake-ups a second
_LEADS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)


@dataclass(frozen=True, slots=True)
class DeclaredHistogram:
    """The name, help text and labels of a histogram."""

    name: str
    text: str
    labels: tuple[str, ...]


class Latency:
    """A histogram whose latencies also enter the window. Used on the Trio thread."""

    def __init__(self, histogram: Histogram, recent: Callable[[float], None]) -> None:
        self._histogram = histogram
        self._recent = recent

    def observe(self, seconds: float, trace_id: str | None = None) -> None:
        """Record one latency in seconds, with a trace as its exemplar."""
        self._histogram.observe(seconds, None if trace_id is None else {"trace_id": trace_id})
        self._recent(seconds)


class Latencies:
    """All latency histograms, in seconds. ``declared`` lists them; ``recent`` has the window."""

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        window_seconds: float = 60,
        ledger_kind: str = "sqlite",
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self.recent = Recent(window_seconds)
        self.declared: list[DeclaredHistogram] = []

        self._stage = self._histogram(
            "betrace_stage_latency_seconds", "Time a stage worked on a batch.", "stage"
        )
        ledger = self._histogram(
            "betrace_ledger_write_latency_seconds",
            "Time to record a batch of signals in the ledger.",
            "ledger",
        )
        self.ledger_family = ledger
        self.ledger = Latency(ledger.labels(ledger_kind), self.recent.latency("ledger").observe)
        self.duckdb = Latency(
            self._histogram(
                "betrace_duckdb_insert_latency_seconds", "Time to write a batch of rows to DuckDB."
            ),
            self.recent.latency("duckdb").observe,
        )
        self.fallback = self._histogram(
            "betrace_fallback_write_latency_seconds",
            "Time to write what a store did not take to local files, the disk's sync included.",
            "store",
        )
        for store in ("ledger", "duckdb"):
            self.fallback.labels(store)
        self.end_to_end = Latency(
            self._histogram(
                "betrace_end_to_end_latency_seconds",
                "From the receipt of the last span that mattered, or the trace's close, to the "
                "signal in the ledger.",
            ),
            self.recent.latency("end-to-end").observe,
        )
        self.early_lead = self._histogram(
            "betrace_early_lead_seconds",
            "How long before its close a trace was signalled early.",
            buckets=_LEADS,
        )
        self.timer_delay = self._histogram(
            "betrace_timer_delay_seconds",
            "How late a timer of the Trio thread ran, tried ten times a second.",
        )
        self.evaluation = Latency(
            self._histogram(
                "betrace_rule_evaluation_latency_seconds", "Time to decide the rules of a batch."
            ),
            self.recent.latency("evaluation").observe,
        )

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        self.declared.append(DeclaredHistogram(name, text, labels))
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    async def watch_timers(self) -> None:
        """Observe how late a timer runs, forever. That is how long the Trio thread was busy with
        one task, or waited for the processor or the interpreter's lock."""
        while True:
            due = trio.current_time() + _TIMER_SECONDS
            await trio.sleep_until(due)
            self.timer_delay.observe(trio.current_time() - due)

    def stage(self, name: str) -> Latency:
        """The latency of a stage's work on a batch."""
        return Latency(self._stage.labels(name), self.recent.latency(f"stage {name}").observe)
