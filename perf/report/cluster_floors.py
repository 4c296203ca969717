"""The floors and goals of a cluster, and the figures of the last runs of ``perf.cluster``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from perf.report.floors import MISSED, NOT_RUN, REACHED, Runs

GOAL = "reached, goal too"
HEAD = ("", "floor", "goal", "reached", "")
RUNS = ("cluster-edge", "cluster-roles", "cluster-scale", "cluster-times")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A figure and its limits. ``read`` returns it as text, and as a number that is to be at most
    (with ``least``, at least) ``floor``. It raises KeyError if the run is missing."""

    what: str
    floor: float
    goal: float
    unit: str
    run: str
    read: Callable[[Json], tuple[str, float]]
    least: bool = False

    def shown(self, limit: float) -> str:
        """A limit as text."""
        return f"{'≥' if self.least else '≤'} {limit:,g}{self.unit}"

    def verdict(self, value: float) -> str:
        """Whether the floor and the goal are reached."""
        sign = -1 if self.least else 1
        if sign * value <= sign * self.goal:
            return GOAL
        return REACHED if sign * value <= sign * self.floor else MISSED


def _ratio(regime: str) -> Callable[[Json], tuple[str, float]]:
    def read(found: Json) -> tuple[str, float]:
        row = found[regime]
        median = float(row["ratio"]["median"])
        us = ", ".join(f"{role} {row[role]:.2f}" for role in ("edge", "evaluator", "query"))
        return f"{median:.2f} ({us} µs)", median

    return read


def _edge(found: Json) -> tuple[str, float]:
    rate = float(found["3"]["spans_per_cpu_second"])
    return f"{rate:,.0f} spans/s", rate


def _bytes(found: Json) -> tuple[str, float]:
    size = max(float(row["log_bytes_per_span"]) for row in found.values())
    return f"{size:.0f} bytes", size


def _evaluator(found: Json) -> tuple[str, float]:
    rate = 1e6 / float(found["in_turns"]["evaluator"])
    return f"{rate:,.0f} spans per second of CPU", rate


def _spread(ending: str, first: str, last: str) -> Callable[[Json], tuple[str, float]]:
    """The greatest change of a role's CPU a span between two shapes, as a percentage."""

    def read(found: Json) -> tuple[str, float]:
        one, two = found[f"{first}, {ending}"], found[f"{last}, {ending}"]
        changes = {
            role: 100 * (two[role] / one[role] - 1) for role in ("edge", "evaluator", "query")
        }
        said = ", ".join(f"{role} {change:+.0f} %" for role, change in changes.items())
        return said, max(map(abs, changes.values()))

    return read


def _time(kind: str, quantile: str, scale: float = 1.0) -> Callable[[Json], tuple[str, float]]:
    def read(found: Json) -> tuple[str, float]:
        row = found[kind]
        value = scale * float(row[quantile])
        unit = "ms" if scale > 1 else "s"
        said = f"{quantile} {value:,.3g} {unit} of {row['number']}"
        said += f", p50 {scale * row['p50']:,.3g}; load average {row['load_average']}"
        return said, value

    return read


_SMALL, _MIDDLE, _LARGE = (f"P {number}, 1 × edge and evaluator" for number in (4, 16, 64))

ROWS = (
    Row("CPU a span, all roles at R1 ÷ embedded, 512 a request: all at once on the same cores",
        2.5, 1.7, "", "cluster-roles", _ratio("at_once")),
    Row("the same, edge and evaluator in turns", 2.5, 1.7, "", "cluster-roles",
        _ratio("in_turns")),
    Row("edge, acknowledged at R3, per second of its CPU", 100_000, 300_000, " spans/s",
        "cluster-edge", _edge, least=True),
    Row("evaluator, per process", 200_000, 400_000, " spans/s", "cluster-roles", _evaluator,
        least=True),
    Row("CPU a span by role, P 4 → 64, in turns", 20, 10, " %", "cluster-scale",
        _spread("in turns", _SMALL, _LARGE)),
    Row("the same, at once", 20, 10, " %", "cluster-scale", _spread("at once", _SMALL, _LARGE)),
    Row("CPU a span by role, nodes 1 → 4, at once", 20, 10, " %", "cluster-scale",
        _spread("at once", _MIDDLE, "P 16, 4 × edge and evaluator")),
    Row("bytes of log a span", 90, 60, "", "cluster-edge", _bytes),
    Row("last span → signal in the log", 500, 200, " ms", "cluster-times",
        _time("signal", "p99", 1000)),
    Row("evaluator killed → its partitions current", 10, 4, " s", "cluster-times",
        _time("evaluator", "max")),
    Row("planned move: pause of a partition's output", 1, 0.2, " s", "cluster-times",
        _time("move", "max")),
    Row("NATS leader killed → last refusal", 15, 10, " s", "cluster-times",
        _time("leader", "max")),
)  # fmt: skip


def rows(runs: Runs) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the rows of the table: subject, floor, goal, reached, verdict."""
    for row in ROWS:
        limits = row.shown(row.floor), row.shown(row.goal)
        try:
            said, value = row.read(runs[row.run]["found"])
        except KeyError:
            part = row.run.removeprefix("cluster-")
            yield (row.what, *limits, f"`python -m perf.cluster {part}`", NOT_RUN)
        else:
            yield (row.what, *limits, said, row.verdict(value))
