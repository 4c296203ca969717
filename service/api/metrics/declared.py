"""The declaration of a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, Metric

S = TypeVar("S")
T = TypeVar("T")

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values of the labels, in the declared order, and the number."""


@dataclass(frozen=True, slots=True)
class Declared(Generic[S]):
    """A metric that is read from ``S`` when it is scraped."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...]
    read: Callable[[S], Samples]
    blocks: bool = False
    """Whether reading may block on the operating system. It then happens in a thread and must not
    touch anything that belongs to the Trio thread."""

    exemplars: Callable[[S], Mapping[tuple[str, ...], Exemplar]] | None = None
    """For counters: the exemplars by the values of the labels."""

    def of(self, part: Callable[[T], S]) -> Declared[T]:
        """The same metric, read from a part of ``T``. Without exemplars."""
        return Declared(
            self.name,
            self.kind,
            self.text,
            self.labels,
            lambda whole: self.read(part(whole)),
            self.blocks,
        )

    @property
    def exposed_name(self) -> str:
        """The name as Prometheus sees it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def family(self, sources: S) -> Metric:
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
