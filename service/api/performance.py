"""The numbers of ``/api/performance``.

Totals count from the start; rates and latencies cover the last ``metrics.window_seconds``. All of
them are read on the Trio thread from statistics that exist anyway.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import threading
import time
from collections.abc import Mapping
from typing import Any

import psutil
import trio

from betrace.service.api.sources import Sources
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.layout import NEVER

Json = dict[str, Any]

SHARED_SECONDS = 0.25
"""Quantiles are computed at most this often."""

_SPANS, _ROWS = "spans", "rows"  # names of the rates that are not of stages


class Performance:
    """Reads the numbers, as JSON."""

    def __init__(self, sources: Sources, latencies: Latencies) -> None:
        self._sources = sources
        self._pipeline = sources.pipeline
        self._recent = latencies.recent
        self._rates = latencies.recent.rates(self._counters)
        self._process = psutil.Process()
        self._shown: dict[str, Json] = {}
        self._shown_at = -math.inf

    def _counters(self) -> Mapping[str, float]:
        pipeline = self._pipeline
        return {
            _SPANS: self._sources.accepted_spans(),
            _ROWS: pipeline.project.rows,
            **{name: s.statistics().weight_out for name, s in pipeline.stages.items()},
        }

    def metrics(self) -> Json:
        """Rates, latencies in milliseconds (null if nothing was timed), totals, and the stages."""
        pipeline = self._pipeline
        account = self._sources.account()
        rates = self._rates.rates()
        return {
            "windowSeconds": self._sources.settings.metrics.window_seconds,
            "spanIngestionRate": round(rates[_SPANS], 3),
            "ruleEvaluationP99": self._latency("evaluation")["p99"],
            "tigerBeetleWriteLatency": self._latency("ledger")["p99"],
            "duckDBWriteLatency": self._latency("duckdb")["p99"],
            "duckDBInsertThroughput": round(rates[_ROWS], 3),
            "endToEndP99": self._latency("end-to-end")["p99"],
            "spansAccepted": account.accepted,
            "spansRefused": dict(self._sources.admission.refusals.spans),
            "spansReplayed": account.replayed,
            "spansCarried": account.carried,
            "spansEvaluated": account.evaluated,
            "spansInFlight": account.in_flight,
            "spansDeadLettered": account.dead_lettered,
            "spansDiscarded": account.discarded,
            "signalsRaised": pipeline.evaluate.counts.raised,
            "signalsRetracted": pipeline.evaluate.counts.retracted,
            "activeTenants": len(pipeline.open_traces.tenants),
            "memoryUsageMB": round(self._process.memory_info().rss / 1e6, 1),
            "uptime": self._uptime(),
            "stages": {name: self._stage(name, rates[name]) for name in pipeline.stages},
        }

    def _stage(self, name: str, rate: float) -> Json:
        stats = self._pipeline.stages[name].statistics()
        last = stats.last_progress
        return {
            "in": stats.items_in,
            "out": stats.items_out,
            "unit": self._pipeline.queues[name].unit,
            "unitsIn": stats.weight_in,
            "unitsOut": stats.weight_out,
            "rate": round(rate, 3),
            "latencyMs": self._latency(f"stage {name}"),
            "errors": stats.failed,
            "dead": stats.dead,
            "lastError": stats.last_error,
            "lastProgress": None if last is None else self._sources.wall_time(last),
        }

    def _latency(self, name: str) -> Json:
        """Quantiles in milliseconds, shared by requests at about the same time."""
        now = trio.current_time()
        if now - self._shown_at >= SHARED_SECONDS:
            self._shown.clear()
            self._shown_at = now
        if name not in self._shown:
            found = self._recent.latency(name).quantiles()
            self._shown[name] = {
                quantile: None if seconds is None else round(1000 * seconds, 4)
                for quantile, seconds in (
                    ("p50", found.p50),
                    ("p95", found.p95),
                    ("p99", found.p99),
                )
            }
        return self._shown[name]

    def queues(self) -> list[Json]:
        """A row for each channel. Reading resets the peak."""
        peaks = {name: queue.api_peak.take() for name, queue in self._pipeline.queues.items()}
        return [{**row, "peak": peaks[row["name"]]} for row in self.fill()]

    def fill(self) -> list[Json]:
        """A row for each channel, without the peak."""
        found = []
        for name, queue in self._pipeline.queues.items():
            stats = queue.send.statistics()
            stage = self._pipeline.stages[name].statistics()
            found.append(
                {
                    "name": name,
                    "unit": queue.unit,
                    "currentSize": stats.size,
                    "capacity": stats.capacity,
                    "utilizationPercent": round(100 * stats.fill, 1),
                    "concurrentConsumers": stage.workers,
                    "busyConsumers": stage.busy_workers,
                    "waitingSenders": stats.waiting_senders,
                    "waitingReceivers": stats.waiting_receivers,
                }
            )
        return found

    def trace_windows(self) -> Json:
        """Open traces and their memory, as of the last second."""
        survey = self._pipeline.correlate.clock.survey
        oldest = None if survey.oldest_ns == NEVER else (time.time_ns() - survey.oldest_ns) / 1e9
        return {
            "activeWindows": survey.open,
            "longLived": survey.long_lived,
            "closedKept": survey.closed,
            "totalSpansInMemory": survey.spans,
            "memoryBytes": survey.nbytes,
            "oldestSeconds": None if oldest is None else round(oldest, 1),
        }

    def system(self) -> Json:
        """Memory, CPU time, threads and garbage collections of the process."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        memory = self._process.memory_info()
        return {
            "memory": {"rssBytes": memory.rss, "virtualBytes": memory.vms},
            "cpu": {
                "userSeconds": usage.ru_utime,
                "systemSeconds": usage.ru_stime,
                "cores": os.cpu_count(),
            },
            "threads": threading.active_count(),
            "gc": {"collections": [each["collections"] for each in gc.get_stats()]},
            "uptime": self._uptime(),
        }

    def _uptime(self) -> float:
        return round(time.time() - self._sources.started_at, 1)
