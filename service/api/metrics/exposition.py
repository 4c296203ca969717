"""All metrics: declared once, with help texts and labels, and read when they are scraped.

Stages know nothing about metrics: counters and gauges are read from statistics that exist anyway.
Only latencies are observed as they happen (:mod:`betrace.service.telemetry.latencies`), once per
batch.

Reading the counters takes the Trio thread about a millisecond, whatever the number of tenants.
Reads that may block (the disk, /proc) and rendering happen in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_open_metrics

from betrace.channels import ThreadRunner
from betrace.service.api.metrics import alerts, cluster, flow, stages, stores
from betrace.service.api.metrics.declared import Declared
from betrace.service.api.sources import Sources
from betrace.service.telemetry.latencies import Latencies

DECLARED: tuple[Declared[Sources], ...] = (
    *flow.DECLARED,
    *alerts.DECLARED,
    *stages.DECLARED,
    *stores.DECLARED,
    *cluster.DECLARED,
)
SCRAPE_SECONDS = 5.0
"""Timeout of a scrape. Prometheus itself gives up after 10 s."""


TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def media_type(accept: str) -> str:
    """The format for a scraper with this Accept header: Prometheus' text format, or OpenMetrics,
    which has exemplars, if the scraper names it."""
    return OPEN_METRICS_TYPE if "application/openmetrics-text" in accept.lower() else TEXT_TYPE


class Exposition:
    """Renders the metrics in Prometheus' text format or as OpenMetrics."""

    def __init__(self, sources: Sources, latencies: Latencies) -> None:
        self._sources = sources
        self._observed = latencies.registry
        self._process = CollectorRegistry()
        register_process(self._process)
        self._threads = ThreadRunner("metrics", 1)

    async def scrape(self, media_type: str = TEXT_TYPE) -> bytes:
        """All metrics in the given format. Call it on the Trio thread. Raises
        :exc:`betrace.channels.ThreadTimeout` when the disk does not answer."""
        families = [each.family(self._sources) for each in DECLARED if not each.blocks]
        if self._sources.node is not None:
            others = list(self._sources.node.cluster.others.role_metrics())
            names = {family.name for family in others}  # the edge counts what comes in
            families = [family for family in families if family.name not in names] + others
        return await self._threads.run(self._render, families, media_type, timeout=SCRAPE_SECONDS)

    def close(self) -> None:
        """End the thread."""
        self._threads.close()

    def _render(self, families: list[Metric], media_type: str) -> bytes:
        blocking = [each.family(self._sources) for each in DECLARED if each.blocks]
        observed, process = self._observed.collect(), self._process.collect()
        every = Collected(chain(observed, families, blocking, process))
        generate = generate_open_metrics if media_type == OPEN_METRICS_TYPE else generate_latest
        return generate(every)  # type: ignore[operator, no-any-return]


class Collected:
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
