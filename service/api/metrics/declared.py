"""The declaration of a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from betrace.service.api.sources import Sources

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels, in the declared order, and the number."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric that is read when it is scraped."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...]
    read: Callable[[Sources], Samples]
    blocks: bool = False
    """Whether reading may block on the operating system. It then happens in a thread and must not
    touch anything that belongs to the Trio thread."""

    def family(self, sources: Sources) -> Metric:
        """The metric with its current values."""
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = family(self.name, self.text, labels=self.labels)
        for labels, value in self.read(sources):
            metric.add_metric(list(labels), value)
        return metric


def one(value: float) -> Samples:
    """The sample of a metric without labels."""
    return [((), value)]
