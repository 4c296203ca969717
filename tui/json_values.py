"""Lenient access to JSON: a value that is missing or has another type becomes an empty one."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def mapping(value: object) -> Json:
    """An object, or an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[Json]:
    """The objects of a list, without its other elements."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def as_float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def as_int(value: object) -> int:
    """A number as an integer; 0 for anything else."""
    return int(value) if isinstance(value, int | float) else 0


def as_text(value: object) -> str:
    return value if isinstance(value, str) else ""
