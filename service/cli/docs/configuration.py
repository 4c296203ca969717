"""``config.toml`` and ``docs/configuration.md``, made from the settings' definitions.

``python -m betrace.service.cli.docs.configuration --toml`` or ``--markdown`` prints one; a test
compares them with the files, so a setting cannot be missing there.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from betrace.service.config.load import PREFIX
from betrace.service.config.settings import Settings

WIDTH = 100


def sections(
    model: BaseModel | None = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, BaseModel]]:
    """Each section's dotted name and its defaults, in order."""
    model = model or Settings()
    if path:
        yield ".".join(path), model
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from sections(value, (*path, name))


def options(section: BaseModel) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Name, definition and default of each setting directly in ``section``."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if not isinstance(value, BaseModel):
            yield name, field, value


def toml() -> str:
    """The text of ``config.toml``."""
    lines = [
        "# Every setting of BeTrace with its default. The service starts on this file unchanged.",
        "# A setting left out has its default. Environment variables override the file",
        f"# ({PREFIX}STORAGE__PATH for path in [storage]), and flags override both.",
        "# Made by: python -m betrace.service.cli.docs.configuration --toml > config.toml",
    ]
    for title, section in sections():
        lines += ["", *_comment(_text(type(section).__doc__)), f"[{title}]"]
        for name, field, default in options(section):
            lines += _comment(_text(field.description))
            lines.append(f"{name} = {toml_value(default)}")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The text of ``docs/configuration.md``."""
    lines = [
        "# Configuration",
        "",
        "`betrace serve --config config.toml` reads the file; a setting left out has its default.",
        f"Environment variables override the file (`{PREFIX}STORAGE__PATH=/data` sets `path` in",
        "`[storage]`; lists and tables are written as JSON), and flags override both. An unknown",
        "key, a wrong type, a value out of bounds or settings that contradict each other stop the",
        "start with a message that says what would be right. Sizes are in bytes, and names say",
        "their units.",
        "",
        "Made by `python -m betrace.service.cli.docs.configuration --markdown "
        "> docs/configuration.md`.",
    ]
    for title, section in sections():
        lines += ["", f"## `[{title}]`", "", _text(type(section).__doc__)]
        rows = list(options(section))
        if rows:
            lines += ["", "| setting | default | allowed | meaning |", "|---|---|---|---|"]
        for name, field, default in rows:
            lines.append(
                f"| `{name}` | `{toml_value(default)}` | {_allowed(field)} "
                f"| {_text(field.description)} |"
            )
    return "\n".join(lines) + "\n"


def _text(description: str | None) -> str:
    return " ".join((description or "").replace("``", "`").split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")


def toml_value(value: Any) -> str:
    """``value`` as TOML; a secret as empty text."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:_}" if value >= 10_000 else str(value)
        case float():
            return f"{value:g}" if value % 1 else f"{value:.1f}"
        case dict():
            return "{" + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml_value, value)) + "]"
        case Path():
            return f'"{value if value.is_absolute() else f"./{value}"}"'
        case _:
            return f'"{value}"'


def _allowed(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(field.annotation))
    bounds = []
    for item in field.metadata:
        match item:
            case annotated_types.Gt(gt=low):
                bounds.append(f"> {toml_value(low)}")
            case annotated_types.Ge(ge=low):
                bounds.append(f"≥ {toml_value(low)}")
            case annotated_types.Lt(lt=high):
                bounds.append(f"< {toml_value(high)}")
            case annotated_types.Le(le=high):
                bounds.append(f"≤ {toml_value(high)}")
            case _:
                pass
    return ", ".join(bounds)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--toml"]:
            sys.stdout.write(toml())
        case ["--markdown"]:
            sys.stdout.write(markdown())
        case _:
            sys.exit("usage: python -m betrace.service.cli.docs.configuration --toml | --markdown")
