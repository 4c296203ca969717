"""The metrics: declared once, with help and labels, and read when they are scraped.

Stages know nothing of metrics: counters and gauges are read from the statistics that the parts keep
anyway. Only latencies are observed as they happen (:mod:`betrace.service.telemetry.latencies`),
once a batch.

Reading the counters takes the Trio thread a millisecond or so, whatever the number of tenants; what
may block (the disk, /proc) and the rendering are done in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric

from betrace.service.api.metrics import flow, stages, stores
from betrace.service.api.metrics.declared import Declared
from betrace.service.telemetry.latencies import Latencies

if TYPE_CHECKING:
    from betrace.service.app import Service

__all__ = ["DECLARED", "Declared", "Exposition", "register_process"]

DECLARED = (*flow.DECLARED, *stages.DECLARED, *stores.DECLARED)


class Exposition:
    """Everything that a scrape gives, in two steps: :meth:`read` on the Trio thread, and
    :meth:`render` in any."""

    def __init__(self, service: Service, latencies: Latencies) -> None:
        self._service = service
        self._observed = latencies.registry
        self._process = CollectorRegistry()
        register_process(self._process)

    def read(self) -> list[Metric]:
        """The metrics that belong to the Trio thread."""
        return [each.family(self._service) for each in DECLARED if not each.blocks]

    def render(self, families: list[Metric]) -> bytes:
        """Prometheus' text, of those and of what is read from anywhere."""
        blocking = [each.family(self._service) for each in DECLARED if each.blocks]
        given = CollectorRegistry()
        given.register(_Given([*families, *blocking]))  # type: ignore[arg-type]
        return b"".join(map(generate_latest, (self._observed, given, self._process)))


class _Given:
    """A collector of what was read before."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def register_process(registry: CollectorRegistry) -> None:
    """What prometheus_client knows of the process."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
