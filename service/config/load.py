"""Loads the configuration: ``config.toml``, then environment variables, then flags.

A variable is named ``BETRACE_<SECTION>__<SETTING>``, such as ``BETRACE_STORAGE__PATH``; lists and
tables are written as JSON. Every error raises :exc:`ConfigError`.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from betrace.service.config.settings import Settings
from betrace.service.config.suggest import close_match

PREFIX = "BETRACE_"

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text in quotes",
    "path": "text in quotes",
    "dict": "a table",
    "list": "a list",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


class ConfigError(Exception):
    """The configuration cannot be used. ``problems`` has a sentence with a remedy for each error;
    the text of the exception has one per line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


_REMOVED = {
    "ingest.server": "delete it: spans are always received by BeTrace's own HTTP/1.1 server",
}
"""Settings of earlier versions, and what to do about them."""


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings from the file at ``path`` (None means the defaults), the environment, and
    ``overrides`` with dotted keys (``{"storage.path": "/data"}``). Later sources win.

    Raises :exc:`ConfigError` for a file that cannot be read, an unknown key, a wrong type, a
    value out of bounds, and settings that contradict each other.
    """
    file = {} if path is None else _read(path)
    flags = _nested(overrides or {})
    origin = _Origin(path, flags)
    _check_file(file, origin)
    _check_variables()

    class Loader(BaseSettings, Settings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid"
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, file)

    try:
        return Loader(**flags)
    except SettingsError as error:
        problems = [f"{error}: write a table as JSON, such as '{{\"acme\": 5000}}'"]
    except ValidationError as error:
        problems = [origin.explain(fault) for fault in error.errors()]
    # Not in the handlers, because pydantic's errors take no part in garbage collection.
    raise ConfigError(problems)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            [f"{path} cannot be read ({error.strerror}); name a file that exists with --config"]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 text; save it as UTF-8"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path} is not valid TOML: {error}; correct it there"]) from error


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested


class _Origin:
    """Knows where a value came from, so that an error names what to change."""

    def __init__(self, path: Path | None, flags: Mapping[str, Any]) -> None:
        self._path = path
        self._flags = flags

    def of(self, loc: tuple[int | str, ...]) -> str:
        table: Any = self._flags
        for part in loc:
            table = table.get(part) if isinstance(table, Mapping) else None
        if table is not None:
            return "a flag"
        for end in range(len(loc), 0, -1):
            variable = PREFIX + "__".join(str(part) for part in loc[:end]).upper()
            if variable in os.environ:
                return variable
        return str(self._path or "the defaults")

    def explain(self, fault: ErrorDetails) -> str:
        """A sentence with a remedy for an error that pydantic found."""
        loc, kind = fault["loc"], fault["type"]
        key = ".".join(str(part) for part in loc)
        origin = self.of(loc)
        if kind == "extra_forbidden" and key in _REMOVED:
            return f"{key} in {origin} is no longer a setting; {_REMOVED[key]}"
        if kind == "extra_forbidden":
            return f"{key} in {origin} is not a setting; {_suggestion(loc)}"
        if kind == "model_type":
            return f"{key} in {origin} must be a table; write [{key}] and its settings below it"
        message = fault["msg"].removeprefix("Value error, ")
        field, default = _lookup(loc)
        if kind == "value_error" and (not field or isinstance(default, BaseModel)):
            # A check of a whole section or of all settings names the settings itself.
            whole = not key or message.startswith(f"{loc[0]}.")
            return message if whole else f"{key}: {message}"
        secret = isinstance(default, SecretStr)
        shown = "" if secret else f" {json.dumps(fault['input'], default=str)}"
        if kind == "value_error":
            return f"{key}{shown} in {origin} {message}"
        context = fault.get("ctx", {})
        if kind in _BOUNDS:
            words, name = _BOUNDS[kind]
            right = f"{words} {context[name]:,}".replace(",", "_")
        elif kind == "literal_error":
            right = context["expected"].replace("'", '"')
        else:
            right = _KINDS.get(kind.split("_")[0], message)
        example = "" if secret else f", such as {json.dumps(default, default=str)}"
        return f"{key}{shown} in {origin} is wrong; it must be {right}{example}"


def _lookup(loc: tuple[int | str, ...]) -> tuple[bool, Any]:
    """Whether ``loc`` is a setting or a section, and its default."""
    value: Any = Settings()
    for part in loc:
        if isinstance(value, BaseModel) and str(part) in type(value).model_fields:
            owner, value = value, getattr(value, str(part))
            if value is None:
                value = optional_section(type(owner), str(part))
        elif not isinstance(value, list | dict):
            return False, None
    return bool(loc), value


def optional_section(owner: type[BaseModel], name: str) -> BaseModel | None:
    """The defaults of a section that is absent by default; None if ``name`` is not one."""
    for kind in get_args(owner.model_fields[name].annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind()
    return None


def _suggestion(loc: tuple[int | str, ...]) -> str:
    *sections, name = (str(part) for part in loc)
    known, table = _lookup(tuple(sections))
    here = list(type(table).model_fields) if isinstance(table, BaseModel) else []
    if not sections:
        here = list(Settings.model_fields)
    near = close_match(name, here)
    if near:
        return f"did you mean {'.'.join([*sections, near])}?"
    elsewhere = [
        f"{section}.{name}"
        for section in Settings.model_fields
        if name in type(_lookup((section,))[1]).model_fields
    ]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    what = f"settings of [{'.'.join(sections)}]" if known else "sections"
    return f"the {what} are {', '.join(here)}"


def _check_file(file: dict[str, Any], origin: _Origin) -> None:
    """Refuse wrong types that pydantic would convert, such as "5" or true for a number. Only
    variables and flags are always text. (Validated as JSON, where strict mode accepts paths.)"""
    faults: list[ErrorDetails] = []
    try:
        Settings.model_validate_json(json.dumps(file, default=str), strict=True)
    except ValidationError as error:
        # Contradictions are checked later, because a variable may resolve them.
        faults = [fault for fault in error.errors() if fault["type"] != "value_error"]
    if faults:
        raise ConfigError([origin.explain(fault) for fault in faults])


def _check_variables() -> None:
    """Refuse variables of unknown sections, which pydantic-settings would ignore."""
    problems = []
    for variable in os.environ:
        section, divider, _ = variable.lower().removeprefix(PREFIX.lower()).partition("__")
        ours = variable.upper().startswith(PREFIX) and divider
        if ours and section not in Settings.model_fields:
            problems.append(f"{variable} does not belong to a section; {_suggestion((section,))}")
    if problems:
        raise ConfigError(problems)
