"""Rule definitions, and the problems reported for invalid ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from betrace.service.config.suggest import close_match
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.examples import Example, read_examples
from betrace.service.rules.parse import parse
from betrace.service.rules.syntax import RuleSyntax
from betrace.service.rules.values import value_text
from betrace.service.signals import rule_version

SEVERITIES = ("critical", "high", "medium", "low", "info")
ALERT, SHADOW = "alert", "shadow"
JUDGE, SKIP = "judge", "skip"
RULE_ID_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}$"
MAX_LABELS = 32


@dataclass(frozen=True, slots=True)
class Rule:
    """A tenant's rule. ``version`` is a hash of ``condition``, ``syntax`` its syntax tree.

    ``mode`` is ``alert``, or ``shadow``: its signals are recorded and shown, but sent to nobody.
    ``incomplete`` is ``judge``, or ``skip``: traces whose spans name a parent that never came do
    not break the rule.
    """

    id: str
    name: str
    description: str
    severity: str  # one of SEVERITIES
    enabled: bool
    labels: dict[str, str] = field(hash=False)
    condition: str
    version: str
    syntax: RuleSyntax
    mode: str = ALERT
    incomplete: str = JUDGE
    examples: tuple[Example, ...] = ()

    def definition(self, *, examples: bool = True) -> dict[str, Any]:
        """The fields as in a rule file, without ``mode``, ``incomplete`` and ``examples`` where
        they are the default."""
        found: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "description": self.description,
            "severity": self.severity,
            "enabled": self.enabled,
            "labels": dict(self.labels),
            "condition": self.condition,
        }
        if self.mode != ALERT:
            found["mode"] = self.mode
        if self.incomplete != JUDGE:
            found["incomplete"] = self.incomplete
        if examples and self.examples:
            found["examples"] = [example.definition() for example in self.examples]
        return found


def etag(rule: Rule) -> str:
    """The rule's entity tag for HTTP, in quotes: a hash of its definition."""
    text = json.dumps(rule.definition(), sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


@dataclass(frozen=True, slots=True)
class Problem:
    """An error in a rule file or definition.

    ``source`` is the name of the file, ``line`` and ``column`` (from 1) the place in it, if known.
    ``syntax`` is set if the condition does not parse; its own positions count from the beginning
    of the condition. ``path`` leads to the value in the rule, as keys and numbers.
    """

    source: str
    message: str
    rule_id: str | None = None
    line: int | None = None
    column: int | None = None
    hint: str | None = None
    syntax: RuleSyntaxError | None = None
    path: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        """``file:line:column: rule id: message``; for a condition, also its line and a caret."""
        place = [self.source] + [str(at) for at in (self.line, self.column) if at is not None]
        rule = f"rule {self.rule_id}: " if self.rule_id else ""
        lines = [f"{':'.join(place)}: {rule}{self.message}"]
        if self.syntax is not None:
            lines += ["  " + line for line in self.syntax.excerpt().split("\n")]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class RuleFileError(ValueError):
    """The rules are invalid; ``problems`` are all that were found, at least one."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def _label_text(value: Any) -> Any:
    """The text of a label: YAML reads ``tier: 1`` as a number."""
    return value_text(value) if isinstance(value, bool | int | float) else value


_Label = Annotated[str, BeforeValidator(_label_text), Field(max_length=1024)]


class _Definition(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(pattern=RULE_ID_PATTERN)
    name: str = Field(default="", max_length=256)
    description: str = Field(default="", max_length=4096)
    severity: Literal["critical", "high", "medium", "low", "info"] = "medium"
    enabled: bool = True
    labels: dict[Annotated[str, Field(min_length=1, max_length=128)], _Label] = Field(
        default_factory=dict, max_length=MAX_LABELS
    )
    mode: Literal["alert", "shadow"] = "alert"
    incomplete: Literal["judge", "skip"] = "judge"
    condition: str
    examples: list[Any] = Field(default_factory=list)


_CHOICES = {"mode": (ALERT, SHADOW), "incomplete": (JUDGE, SKIP)}


def make_rule(definition: Mapping[str, Any], source: str = "rule") -> Rule:
    """The rule defined by a mapping with the keys of a rule file.

    ``name`` defaults to the id, ``severity`` to medium, ``enabled`` to true; null means the
    default. Raises :exc:`RuleFileError` with all problems, whose place is ``source``.
    """
    rule_id = definition.get("id")
    shown_id = rule_id if isinstance(rule_id, str) else None
    problems = []
    model: _Definition | None = None
    try:
        model = _Definition.model_validate(
            {key: value for key, value in definition.items() if value is not None}
        )
    except ValidationError as error:
        problems = [_problem(details, source, shown_id) for details in error.errors()]
    condition = definition.get("condition")
    if isinstance(condition, str):
        try:
            syntax = parse(condition)
        except RuleSyntaxError as error:
            problems.append(Problem(source, error.message, shown_id, hint=error.hint, syntax=error))
    given = definition.get("examples")
    examples, faults = read_examples(given if isinstance(given, list) else ())
    problems += [
        Problem(source, fault.message, shown_id, hint=fault.hint, path=("examples", *fault.path))
        for fault in faults
    ]
    if problems or model is None:
        raise RuleFileError(problems)
    fields = model.model_dump(exclude={"examples"})
    fields["name"] = fields["name"] or model.id
    return Rule(**fields, examples=examples, version=rule_version(model.condition), syntax=syntax)


def _problem(details: ErrorDetails, source: str, rule_id: str | None) -> Problem:
    """One of pydantic's errors, in the words of rule files."""
    key = str(details["loc"][0]) if details["loc"] else ""
    context = details.get("ctx", {})
    hint = None
    match details["type"]:
        case "extra_forbidden":
            message = f"unknown key '{key[:64]}'"
            meant = close_match(key, _Definition.model_fields)
            keys = ", ".join(_Definition.model_fields)
            hint = f"did you mean '{meant}'?" if meant else f"the keys of a rule are: {keys}"
        case "missing":
            message = f"the key '{key}' is missing"
        case "string_type" if key == "labels":
            message = f"the label '{details['loc'][1]}' is not text"
            hint = "put it in quotes"
        case "string_type":
            message = f"'{key}' is not text"
            hint = "put it in quotes"
        case "bool_type":
            message = f"'{key}' must be true or false"
        case "dict_type":
            message = f"'{key}' is not a mapping"
            hint = "write it as {team: payments}"
        case "list_type":
            message = f"'{key}' is not a list"
        case "literal_error":
            known = _CHOICES.get(key, SEVERITIES)
            message = f"'{key}' must be one of {', '.join(known)}"
            meant = close_match(str(details["input"]), known)
            hint = f"did you mean '{meant}'?" if meant else None
        case "string_pattern_mismatch":
            message = f"'{key}' is not a valid rule id"
            hint = "an id has 1 to 128 characters a-z 0-9 . _ - and begins with a letter or digit"
        case "string_too_long":
            message = f"'{key}' is longer than {context['max_length']} characters"
        case "too_long":
            message = f"'{key}' has more than {context['max_length']} entries"
        case _:
            message = f"'{key}': {details['msg']}"
    return Problem(source, message, rule_id, hint=hint)
