"""Examples in rule files: traces that a rule must find broken or kept.

The spans of an example have the keys of :data:`SPAN_KEYS`. A text stands for a span with this name,
``children`` are spans whose parent is the one that has them, and ``times`` repeats a span with its
children.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from betrace.service.config.suggest import close_match
from betrace.service.rules.syntax import KINDS, STATUSES

MAX_EXAMPLES = 20  # of a rule
MAX_SPANS = 1000  # of an example
MAX_DEPTH = 10  # of children
MAX_NESTING = 20  # of values of attributes
MAX_BYTES = 64 * 1024  # of a rule's examples, as JSON
EXPECTATIONS = ("broken", "kept")
CLAUSES = ("always", "never")

_Path = tuple[str | int, ...]
_EXAMPLE_KEYS = ("name", "expect", "clause", "spans")
_NUMBER = "number"
SPAN_KEYS: Mapping[str, str] = {
    "name": "text",
    "attributes": "mapping",
    "resource": "mapping",
    "service": "text",
    "scope": "text",
    "kind": "text",
    "status": "text",
    "status_message": "text",
    "start_ms": _NUMBER,
    "duration_ms": _NUMBER,
    "span_id": "id",
    "parent_id": "id",
    "events": "list",
    "links": "list",
    "children": "list",
    "times": "integer",
}
_EVENT_KEYS = {"name": "text", "attributes": "mapping", "offset_ms": _NUMBER}
_LINK_KEYS = {"trace_id": "id", "span_id": "id", "attributes": "mapping"}
_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "text": ((str,), "is not text"),
    "id": ((str, int), "is not text"),
    "mapping": ((dict,), "is not a mapping"),
    "list": ((list,), "is not a list"),
    _NUMBER: ((int, float), "is not a number"),
    "integer": ((int,), "is not a whole number"),
}
_MAX_TEXT = 4096
_MAX_TIME_MS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Example:
    """A trace, and what a rule must say of it: ``expect`` is ``broken`` or ``kept``, and ``clause``
    the one that breaks, if that matters. ``spans`` are as written in the file; ``line`` is their
    place in it, if known."""

    name: str
    expect: str
    clause: str | None
    spans: tuple[Any, ...] = field(hash=False)
    line: int | None = field(default=None, compare=False)

    def definition(self) -> dict[str, Any]:
        """The keys as in a rule file."""
        clause = {"clause": self.clause} if self.clause else {}
        return {"name": self.name, "expect": self.expect, **clause, "spans": list(self.spans)}


@dataclass(frozen=True, slots=True)
class ExampleFault:
    """What is wrong with an example. ``path`` leads to the value, from the list of examples on."""

    path: _Path
    message: str
    hint: str | None = None


class _Faults(Exception):  # noqa: N818
    """The first fault of an example."""

    def __init__(self, path: _Path, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.fault = ExampleFault(path, message, hint)


def read_examples(given: Sequence[Any]) -> tuple[tuple[Example, ...], list[ExampleFault]]:
    """The examples in the value of ``examples``, and the faults of the others."""
    if len(given) > MAX_EXAMPLES:
        message = f"'examples' has more than {MAX_EXAMPLES} entries"
        return (), [ExampleFault((), message, "split the rule, or leave some out")]
    examples: list[Example] = []
    faults: list[ExampleFault] = []
    for number, each in enumerate(given):
        try:
            examples.append(_example(each, (number,)))
        except _Faults as error:
            faults.append(error.fault)
    if not faults and len(json.dumps(given)) > MAX_BYTES:
        message = f"'examples' has more than {MAX_BYTES >> 10} KiB as JSON"
        return (), [ExampleFault((), message, "shorten the examples, or split the rule")]
    return tuple(examples), faults


def flat_spans(spans: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The spans of an example, one mapping for each, with ``children`` and ``times`` written out.
    Each has a ``span_id``."""
    number = 0

    def walk(items: Sequence[Any], parent: str | int | None) -> Iterator[dict[str, Any]]:
        nonlocal number
        for item in items:
            given: dict[str, Any] = {"name": item} if isinstance(item, str) else dict(item)
            children = given.pop("children", ())
            for _ in range(given.pop("times", 1)):
                number += 1
                span = dict(given)
                span.setdefault("span_id", f"(span {number})")
                if parent is not None:
                    span.setdefault("parent_id", parent)
                yield span
                yield from walk(children, span["span_id"])

    return walk(spans, None)


def _example(given: Any, path: _Path) -> Example:
    _mapping(given, path, _EXAMPLE_KEYS, "an example")
    for key in ("expect", "spans"):
        if key not in given:
            hint = "an example has name, expect (broken or kept) and spans"
            raise _Faults(path, f"the key '{key}' of the example is missing", hint)
    name = given.get("name", f"example {int(path[0]) + 1}")
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise _Faults((*path, "name"), "'name' is not text of 1 to 256 characters")
    _choice(given["expect"], EXPECTATIONS, (*path, "expect"))
    clause = given.get("clause")
    if clause is not None:
        _choice(clause, CLAUSES, (*path, "clause"))
        if given["expect"] == "kept":
            raise _Faults((*path, "clause"), "a rule that is kept breaks no clause")
    spans = given["spans"]
    at = (*path, "spans")
    if not isinstance(spans, list) or not spans:
        raise _Faults(at, "'spans' is not a list of at least one span")
    if _check_spans(spans, at, 1) > MAX_SPANS:
        raise _Faults(at, f"the example has more than {MAX_SPANS} spans")
    return Example(name, given["expect"], clause, tuple(spans))


def _check_spans(spans: Sequence[Any], path: _Path, depth: int) -> int:
    """Check spans; returns how many they are. Stops when there are too many."""
    if depth > MAX_DEPTH:
        raise _Faults(path, f"children nest deeper than {MAX_DEPTH} levels", "use parent_id")
    found = 0
    for number, span in enumerate(spans):
        at = (*path, number)
        if isinstance(span, str):
            found += 1
        else:
            found += _check_span(span, at, depth)
        if found > MAX_SPANS:
            break
    return found


def _check_span(span: Any, at: _Path, depth: int) -> int:
    _mapping(span, at, SPAN_KEYS, "a span")
    if "name" not in span:
        raise _Faults(at, "the key 'name' of the span is missing", "begin with - name: …")
    _values(span, SPAN_KEYS, at)
    for key, known in (("kind", KINDS), ("status", STATUSES)):
        if key in span:
            _choice(span[key], known, (*at, key))
    for key, keys in (("events", _EVENT_KEYS), ("links", _LINK_KEYS)):
        for number, item in enumerate(span.get(key, ())):
            _mapping(item, (*at, key, number), keys, f"an entry of '{key}'")
            _values(item, keys, (*at, key, number))
    times = span.get("times", 1)
    if not 1 <= times <= MAX_SPANS:
        raise _Faults((*at, "times"), f"'times' must be 1 to {MAX_SPANS}")
    if times > 1 and "span_id" in span:
        raise _Faults((*at, "span_id"), "a span with 'times' cannot have a 'span_id'")
    within = _check_spans(span.get("children", ()), (*at, "children"), depth + 1)
    return int(times * (1 + within))


def _values(given: Mapping[str, Any], keys: Mapping[str, str], at: _Path) -> None:
    for key, value in given.items():
        types, message = _TYPES[keys[key]]
        if not isinstance(value, types) or isinstance(value, bool):
            hint = "put it in quotes" if keys[key] in ("text", "id") else None
            raise _Faults((*at, key), f"'{key}' {message}", hint)
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise _Faults((*at, key), f"'{key}' is longer than {_MAX_TEXT} characters")
        if isinstance(value, int | float) and not _is_time(keys[key], value):
            raise _Faults((*at, key), f"'{key}' must be at most {_MAX_TIME_MS} ms")
        if isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(name, str):
                    message = f"the attribute {name!r} has a name that is not text"
                    raise _Faults((*at, key), message, "put it in quotes")
                _attribute(inner, (*at, key, name))


def _is_time(kind: str, value: float) -> bool:
    return kind != _NUMBER or -_MAX_TIME_MS <= value <= _MAX_TIME_MS


def _attribute(value: Any, at: _Path, depth: int = 1) -> None:
    if depth > MAX_NESTING:
        raise _Faults(at, f"the value nests deeper than {MAX_NESTING} levels")
    if isinstance(value, list):
        for number, item in enumerate(value):
            _attribute(item, (*at, number), depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            _attribute(item, (*at, str(name)), depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise _Faults(at, f"{value} is not a 64-bit integer", "write it as text or as a decimal")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _Faults(at, f"'{at[-1]}' is not a finite number")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise _Faults(at, f"'{at[-1]}' is no value that a span can have", "put it in quotes")


def _mapping(given: Any, path: _Path, keys: Sequence[str] | Mapping[str, str], what: str) -> None:
    if not isinstance(given, dict):
        raise _Faults(path, f"{what} is not a mapping")
    for key in given:
        if key not in keys:
            meant = close_match(str(key), keys)
            hint = f"did you mean '{meant}'?" if meant else f"{what} has {', '.join(keys)}"
            raise _Faults((*path, str(key)), f"unknown key '{str(key)[:64]}' of {what}", hint)


def _choice(given: Any, known: Sequence[str], path: _Path) -> None:
    if given not in known:
        meant = close_match(str(given), known)
        hint = f"did you mean '{meant}'?" if meant else None
        raise _Faults(path, f"'{path[-1]}' must be one of {', '.join(known)}", hint)


def nanoseconds(milliseconds: float) -> int:
    """A time of an example, rounded to the nanosecond."""
    return round(Decimal(str(milliseconds)) * 1_000_000)
