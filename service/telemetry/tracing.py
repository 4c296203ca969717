"""The service's own traces, of slow batches only, sent by OTLP over HTTP to ``tracing.endpoint``.

A batch that keeps a stage busy for ``tracing.slow_batch_ms`` or longer becomes a trace of three
spans: the batch, and within it the wait in the channel and the work. Spans are made when the batch
is done, so a fast batch costs nothing. A thread of the OpenTelemetry SDK exports them from a
bounded queue, which drops what does not fit. Headers for the endpoint, such as a token, come from
the SDK's variable ``OTEL_EXPORTER_OTLP_HEADERS``.

The service may be its own endpoint: its traces belong to their own tenant, batches with only that
tenant are never traced, and only a few traces are made per second. So a slow service does not keep
itself busy. This module needs the extra ``tracing``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Final

import trio
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_OTLP_HEADERS
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.re import parse_env_headers

from betrace.service.config.edge import Tracing

TENANT_HEADER: Final = "X-Scope-OrgID"
TRACES_A_SECOND: Final = 1.0
MOST_AT_ONCE: Final = 10
_QUEUE_SPANS = 512
_EXPORT_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_SECOND = 1_000_000_000


class SlowBatches:
    """Makes traces of slow batches. Methods run on the Trio thread, except :meth:`close`.

    ``exporter`` sends them, by default to ``settings.endpoint``; ``clock_ns`` is the wall clock.
    """

    def __init__(
        self,
        settings: Tracing,
        exporter: SpanExporter | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.slow_seconds = settings.slow_batch_ms / 1000
        self.skipped = 0
        """Slow batches without a trace, because there were too many."""
        self._tenant = settings.tenant
        self._clock_ns = clock_ns
        self._allowed = float(MOST_AT_ONCE)
        self._allowed_at = -1.0
        resource = Resource.create({"service.name": "betrace", "service.version": _version()})
        self._provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        self._exporter = exporter or _exporter(settings)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=_QUEUE_SPANS,
                max_export_batch_size=_QUEUE_SPANS // 4,
                schedule_delay_millis=1000,
                export_timeout_millis=1000 * _EXPORT_SECONDS,
            )
        )
        self._tracer: Tracer = self._provider.get_tracer("betrace.pipeline", _version())

    def stage(self, name: str, unit: str, weigh: Callable[[Any], int]) -> StageTraces:
        """The observer of one stage."""
        return StageTraces(self, name, unit, weigh)

    def note(
        self,
        stage: str,
        tenants: set[str],
        attributes: Mapping[str, int],
        waited: float,
        seconds: float,
        error: Exception | None,
    ) -> None:
        """Make a trace of a batch that has just finished, unless it contains only the service's own
        traces, or there were too many."""
        if tenants == {self._tenant}:
            return
        if not self._may():
            self.skipped += 1
            return
        end = self._clock_ns()
        middle = end - int(seconds * _SECOND)
        begin = middle - int(waited * _SECOND)
        span = self._tracer.start_span(
            f"batch {stage}",
            start_time=begin,
            attributes={
                "betrace.stage": stage,
                "betrace.batch.tenants": len(tenants),
                "betrace.batch.wait_seconds": waited,
                "betrace.batch.work_seconds": seconds,
                "betrace.batches.skipped": self.skipped,
                **attributes,
            },
        )
        inside = set_span_in_context(span)
        self._tracer.start_span("wait", inside, start_time=begin).end(middle)
        work = self._tracer.start_span("work", inside, start_time=middle)
        if error is not None:
            for failed in (work, span):
                failed.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        work.end(end)
        span.end(end)

    def _may(self) -> bool:
        """A token bucket."""
        now = trio.current_time()
        if self._allowed_at >= 0:
            grown = self._allowed + TRACES_A_SECOND * (now - self._allowed_at)
            self._allowed = min(float(MOST_AT_ONCE), grown)
        self._allowed_at = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def close(self) -> None:
        """Export what is left, but wait only briefly for the endpoint."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            self._exporter.shutdown()  # stops retrying


class StageTraces:
    """Observes one stage: its channel (:meth:`waited`) and its batches."""

    def __init__(
        self, traces: SlowBatches, stage: str, unit: str, weigh: Callable[[Any], int]
    ) -> None:
        self._traces = traces
        self._stage = stage
        self._unit = unit
        self._weigh = weigh
        self._longest = 0.0
        self.slow_seconds = traces.slow_seconds

    def waited(self, seconds: float, weight: int) -> None:
        """An item was taken after waiting this long."""
        self._longest = max(self._longest, seconds)

    def done(self) -> None:
        """A batch is done. With several workers, a wait may be attributed to a concurrent batch."""
        self._longest = 0.0

    def slow(self, items: list[Any], seconds: float, error: Exception | None) -> None:
        """A slow batch is done."""
        waited, self._longest = self._longest, 0.0
        attributes = {
            "betrace.batch.items": len(items),
            f"betrace.batch.{self._unit}": sum(map(self._weigh, items)),
        }
        tenants = {item.tenant for item in items}
        self._traces.note(self._stage, tenants, attributes, waited, seconds, error)


def _version() -> str:
    return version("betrace")


def _exporter(settings: Tracing) -> SpanExporter:
    given = parse_env_headers(os.environ.get(OTEL_EXPORTER_OTLP_HEADERS, ""), liberal=True)
    return OTLPSpanExporter(
        endpoint=settings.endpoint,
        headers={TENANT_HEADER: settings.tenant, **given},
        timeout=_EXPORT_SECONDS,
    )
