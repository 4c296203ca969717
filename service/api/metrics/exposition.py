"""All metrics: declared once, with help texts and labels, and read when they are scraped.

Stages know nothing about metrics: counters and gauges are read from statistics that exist anyway.
Only latencies are observed as they happen (:mod:`betrace.service.telemetry.latencies`), once per
batch.

Reading the counters takes the Trio thread about a millisecond, whatever the number of tenants.
Reads that may block (the disk, /proc) and rendering happen in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric

from betrace.channels import ThreadRunner
from betrace.service.api.metrics import flow, stages, stores
from betrace.service.api.sources import Sources
from betrace.service.telemetry.latencies import Latencies

DECLARED = (*flow.DECLARED, *stages.DECLARED, *stores.DECLARED)
SCRAPE_SECONDS = 5.0
"""Timeout of a scrape. Prometheus itself gives up after 10 s."""


class Exposition:
    """Renders the metrics in Prometheus' text format."""

    def __init__(self, sources: Sources, latencies: Latencies) -> None:
        self._sources = sources
        self._observed = latencies.registry
        self._process = CollectorRegistry()
        register_process(self._process)
        self._threads = ThreadRunner("metrics", 1)

    async def scrape(self) -> bytes:
        """All metrics. Call it on the Trio thread. Raises :exc:`betrace.channels.ThreadTimeout`
        when the disk does not answer."""
        families = [each.family(self._sources) for each in DECLARED if not each.blocks]
        return await self._threads.run(self._render, families, timeout=SCRAPE_SECONDS)

    def close(self) -> None:
        """End the thread."""
        self._threads.close()

    def _render(self, families: list[Metric]) -> bytes:
        blocking = [each.family(self._sources) for each in DECLARED if each.blocks]
        given = CollectorRegistry()
        given.register(_Collected([*families, *blocking]))  # type: ignore[arg-type]
        return b"".join(map(generate_latest, (self._observed, given, self._process)))


class _Collected:
    """A collector of metrics that were read before."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def register_process(registry: CollectorRegistry) -> None:
    """Register prometheus_client's metrics of the process."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
