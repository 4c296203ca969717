"""Quantiles of measured times."""

from __future__ import annotations

from collections.abc import Sequence


def value_at(ordered: Sequence[float], q: float) -> float:
    """The first value of a sorted sequence that comes after the fraction ``q`` of its values; the
    largest one for 1."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
