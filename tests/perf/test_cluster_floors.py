"""Each row of the cluster's floors at its limits."""

from __future__ import annotations

from typing import Any

import pytest

from perf.report.cluster_floors import GOAL, ROWS, rows
from perf.report.floors import MISSED, NOT_RUN, REACHED

Json = dict[str, Any]


def roles(edge: float, evaluator: float, query: float, ratio: float = 1.0) -> Json:
    found = {"edge": edge, "evaluator": evaluator, "query": query}
    return found | {"ratio": {"median": ratio}}


def times(seconds: float) -> Json:
    return {"p50": seconds, "p99": seconds, "max": seconds, "number": 3, "load_average": 1.0}


def runs(ratio: float, rate: float, change: float, size: float, seconds: float) -> Json:
    """Runs with these figures in all rows."""
    edge = {"spans_per_cpu_second": rate, "log_bytes_per_span": size}
    one, other = roles(1, 2, 3), roles(1, 2 * (1 + change / 100), 3)
    shapes = {}
    for regime in ("at once", "in turns"):
        shapes[f"P 4, 1 × edge and evaluator, {regime}"] = one
        shapes[f"P 16, 1 × edge and evaluator, {regime}"] = one
        shapes[f"P 16, 4 × edge and evaluator, {regime}"] = other
        shapes[f"P 64, 1 × edge and evaluator, {regime}"] = other
    whole = roles(1, 1e6 / rate, 1, ratio)
    found: Json = {
        "cluster-edge": {"1": edge, "3": edge},
        "cluster-roles": {"at_once": whole, "in_turns": whole},
        "cluster-scale": shapes,
        "cluster-times": {
            kind: times(seconds) for kind in ("signal", "evaluator", "move", "leader")
        },
    }
    return {name: {"found": each} for name, each in found.items()}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (runs(1.7, 400_000, 9, 60, 0.2), GOAL),
        (runs(2.6, 99_000, -21, 91, 15.1), MISSED),
    ],
)
def test_every_row_has_the_verdict_of_its_figure(found: Json, verdict: str) -> None:
    assert {row[4] for row in rows(found)} == {verdict}


def test_between_goal_and_floor_a_row_is_reached() -> None:
    found = {row[0]: row[4] for row in rows(runs(2.5, 200_000, 19, 90, 0.5))}
    assert found["last span → signal in the log"] == REACHED
    assert found["bytes of log a span"] == REACHED
    assert found["evaluator, per process"] == REACHED
    assert found["CPU a span by role, P 4 → 64, in turns"] == REACHED
    assert found["evaluator killed → its partitions current"] == GOAL


def test_what_was_not_run_names_its_command() -> None:
    found = list(rows({}))
    assert len(found) == len(ROWS)
    assert {row[4] for row in found} == {NOT_RUN}
    assert {row[3] for row in found} == {
        f"`python -m perf.cluster {part}`" for part in ("edge", "roles", "scale", "times")
    }
