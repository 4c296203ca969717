"""The declaration of a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, Metric

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

    exemplars: Callable[[Sources], Mapping[tuple[str, ...], Exemplar]] | None = None
    """For counters: the exemplars by the values of the labels."""

    def family(self, sources: Sources) -> Metric:
        """The metric with its current values."""
        if self.kind == "gauge":
            gauge = GaugeMetricFamily(self.name, self.text, labels=self.labels)
            for labels, value in self.read(sources):
                gauge.add_metric(list(labels), value)
            return gauge
        exemplars = self.exemplars(sources) if self.exemplars is not None else {}
        counter = CounterMetricFamily(self.name, self.text, labels=self.labels)
        for labels, value in self.read(sources):
            counter.add_metric(list(labels), value, exemplar=exemplars.get(labels))
        return counter


def one(value: float) -> Samples:
    """The sample of a metric without labels."""
    return [((), value)]
