"""A history on one line."""

from __future__ import annotations

from collections.abc import Callable

from betrace.tui.format import NONE, duration, plot
from betrace.tui.state import ServiceState


def history_graph(
    state: ServiceState,
    name: str,
    width: int,
    show_value: Callable[[float], str],
    top: float | None = None,
) -> str:
    """The last ``width`` points of a history, the value of a full block, and the period.

    ``top`` is a full block; without it the largest point is.
    """
    points = state.history(name, width)
    if not points:
        return NONE
    full = show_value(max(points) if top is None else top)
    period = duration(round(state.period(name, len(points))))
    return f"{plot(points, width, top)}  full: {full}, last {period}"
