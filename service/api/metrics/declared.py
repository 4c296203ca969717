"""How a metric is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from betrace.service.app import Service

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values of labels, in the declared order, and the number."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric that is read from the service when scraped."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...]
    read: Callable[[Service], Samples]
    blocks: bool = False
    """Whether reading asks the operating system for what may take long; it is then done in a
    thread, and looks at nothing that belongs to the Trio thread."""

    def family(self, service: Service) -> Metric:
        """The metric with its present values."""
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = family(self.name, self.text, labels=self.labels)
        for labels, value in self.read(service):
            metric.add_metric(list(labels), value)
        return metric


def one(value: float) -> Samples:
    """The sample of a metric without labels."""
    return [((), value)]
