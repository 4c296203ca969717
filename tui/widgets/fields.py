"""Names and values below each other."""

from __future__ import annotations

from textual.content import Content


def fields(*pairs: tuple[str, str | tuple[str, str] | Content]) -> Content:
    """One name and value per line, with the values aligned."""
    width = max((len(name) for name, _ in pairs), default=0)
    lines = [
        Content.assemble((f"{name:<{width}}  ", "$text-muted"), value) for name, value in pairs
    ]
    return Content("\n").join(lines)
