"""Declarations of panels. In queries, ``$on`` stands for the selectors of the chosen job and
instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GREEN, YELLOW, RED = "green", "yellow", "red"
RATE = "[$__rate_interval]"

Steps = tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the legend of its series."""

    expr: str
    legend: str = "{{instance}}"


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel. ``unit`` is one of Grafana's unit ids; ``thresholds`` are pairs of a minimum and a
    colour, above ``base``; ``width`` is in 24ths of the page."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    thresholds: Steps = ()
    base: str = GREEN
    kind: Literal["timeseries", "stat", "states"] = "timeseries"
    width: int = 8
    stacked: bool = False
    least: float | None = 0
    most: float | None = None
    states: tuple[tuple[str, str], ...] = ()
    """With the kind ``states``: the name and colour of the values 0, 1, …"""
    link: tuple[str, str] | None = None
    """For a series, such as to a page of the service: the title and the URL."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """Marks on all graphs, at the times at which a query has a value."""

    name: str
    expr: str
    colour: str


def quantiles(metric: str, by: str = "") -> tuple[Query, ...]:
    """Return the median and 99th percentile of a histogram, by instance and optionally ``by``."""
    labels = f"instance, {by}, le" if by else "instance, le"
    legend = f"{{{{{by}}}}}" if by else "{{instance}}"
    buckets = f"sum by ({labels}) (rate({metric}_bucket{{$on}}{RATE}))"
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", f"{legend} {name}")
        for q, name in ((0.5, "p50"), (0.99, "p99"))
    )


def rate(metric: str, by: str, selector: str = "$on") -> str:
    """Return the rate of a counter a second, by label."""
    return f"sum by (instance, {by}) (rate({metric}{{{selector}}}{RATE}))"
