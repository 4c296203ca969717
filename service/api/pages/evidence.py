"""Why a signal was raised, as its page shows it: the rule's text with the broken part marked, and
each check with its count and the spans that it matched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from betrace.service.api.pages.spans import TraceSpans
from betrace.service.rules.definition import Rule
from betrace.service.rules.format import format_check
from betrace.service.rules.places import Place, broken_places
from betrace.service.rules.store import RuleNotFoundError, RuleStore
from betrace.service.rules.syntax import Attribute, RuleSyntax, Scope, span_sets
from betrace.service.rules.wording import (
    FORBIDDEN,
    MET,
    MISSING,
    REQUIRED,
    Counts,
    breach_causes,
)
from betrace.service.signals import Kind

Json = dict[str, Any]

_NO_LONGER = "no longer broken"
_MEANINGS = {
    MISSING: "The rule requires this, and the trace does not have it.",
    FORBIDDEN: "The rule forbids this, and the trace has it.",
    REQUIRED: "The rule requires this, and it does not hold for the trace.",
    MET: "The trace meets the condition that this rule looks for.",
    _NO_LONGER: "Spans that arrived later, or a new version of the rule, changed the verdict.",
}
_WORD = re.compile(rf": ({'|'.join(map(re.escape, _MEANINGS))})(?:: | |$)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ConditionLine:
    """A line of a rule's text, as pieces that are marked or not. ``hit`` says that it is broken."""

    number: int
    pieces: list[tuple[str, bool]]
    hit: bool


@dataclass(frozen=True, slots=True)
class Check:
    """A check, or a group of a rule with ``for each``. ``number`` is its mark in the waterfall, 0
    without one; ``spans`` are the ids and names of its evidence."""

    number: int
    text: str
    role: str
    count: int | None
    spans: list[tuple[str, str | None]]
    broken: bool


@dataclass(frozen=True, slots=True)
class BrokenText:
    """What broke, in words: ``word`` such as ``missing``, ``text`` what is missing, and what that
    means."""

    word: str
    text: str
    meaning: str


def finding(signal: Json) -> BrokenText:
    """What broke, from the signal's message, which begins with the name of the rule."""
    found = _WORD.search(signal["message"])
    if found is None:
        return BrokenText("", signal["message"], "")
    text = found[2].removeprefix("(").removesuffix(")") if found[2][:1] == "(" else found[2]
    return BrokenText(found[1], text, _MEANINGS[found[1]])


def lines(condition: str, places: Sequence[Place]) -> list[ConditionLine]:
    """The lines of a condition, with the characters at ``places`` marked."""
    found = []
    start = 0
    text = condition.rstrip()
    for number, line in enumerate(text.split("\n"), 1):
        end = start + len(line)
        pieces, at = [], start
        for first, last in places:
            first, last = max(first, start), min(last, end)
            if first < last:
                pieces += [(condition[at:first], False), (condition[first:last], True)]
                at = last
        hit = at > start
        pieces.append((condition[at:end], False))
        found.append(ConditionLine(number, [piece for piece in pieces if piece[0]], hit))
        start = end + 1
    return found


def rule_of(rules: RuleStore, tenant: str, rule_id: str, version: str) -> tuple[Rule | None, str]:
    """The rule that a signal was raised by, and how it relates to the rule of today: ``current``,
    ``earlier`` (found among the kept versions), ``changed`` (that version is not kept; the rule of
    today is returned) or ``deleted``. Blocks."""
    try:
        current = rules.rule(tenant, rule_id)
    except RuleNotFoundError:
        current = None
    if current is not None and current.version == version:
        return current, "current"
    for rule in rules.versions(tenant, rule_id):
        if rule.version == version:
            return rule, "earlier" if current else "deleted"
    return current, "changed" if current else "deleted"


def rule_lines(rule: Rule, signal: Json) -> list[ConditionLine]:
    """The text of a rule; if it is the one that raised ``signal``, with the broken part marked."""
    places: list[Place] = []
    if _is_breach(rule, signal):
        places = broken_places(rule.condition, rule.syntax, signal["clause"], signal["counts"])
    return lines(rule.condition, places)


def checks(rule: Rule | None, signal: Json, spans: TraceSpans | None) -> list[Check]:
    """The checks of a signal, the broken ones first. ``spans`` have the names of the evidence."""
    same = rule is not None and rule.version == signal["rule_version"]
    roles = _roles(rule.syntax) if rule is not None and same else {}
    breach = rule is not None and _is_breach(rule, signal)
    broken = _broken(rule.syntax, signal["clause"], signal["counts"]) if rule and breach else set()
    evidence: dict[str, list[str]] = signal["evidence"]
    names = {**dict.fromkeys(signal["counts"]), **dict.fromkeys(evidence)}
    ordered = sorted(names, key=lambda text: text not in broken)
    found: list[Check] = []

    def add(text: str, role: str, count: int | None, ids: Sequence[str], is_broken: bool) -> None:
        number = 1 + sum(1 for each in found if each.number) if ids else 0
        named = [(each, spans.name(each) if spans else None) for each in ids]
        found.append(Check(number, text, role, count, named, is_broken))

    for text in ordered:
        count = signal["counts"].get(text)
        add(text, roles.get(text, ""), count, evidence.get(text, []), text in broken)
    groups = (signal["context"] or {}).get("groups") or {}
    for example in groups.get("examples", []):
        key = ", ".join(f"{name} = {value}" for name, value in example["key"].items())
        add(key or "a group", "group", None, example["spans"], True)
    return found


def first_span(found: Sequence[Check]) -> str | None:
    """The span to look at first: one that broke the rule, else one that made the rule apply."""
    for group in (
        [check for check in found if check.broken],
        [check for check in found if check.role == "when"],
        found,
    ):
        for check in group:
            for span_id, _ in check.spans:
                return span_id
    return None


def named_attributes(rule: Rule | None) -> frozenset[str]:
    """The names of the attributes in a rule."""
    return frozenset(_attributes(rule.syntax)) if rule else frozenset()


def _is_breach(rule: Rule, signal: Json) -> bool:
    """Whether ``signal`` says that a trace broke this version of the rule, not that it no longer
    does."""
    return rule.version == str(signal["rule_version"]) and signal["kind"] == Kind.RAISED


def _roles(syntax: RuleSyntax) -> dict[str, str]:
    never = "looked for" if syntax.bare else "never"
    clauses = ((never, syntax.never), ("always", syntax.always), ("when", syntax.when))
    return {format_check(spans): word for word, node in clauses for spans in span_sets(node)}


def _broken(syntax: RuleSyntax, clause: str, counts: Counts) -> set[str]:
    if syntax.relational:
        return set()
    return {
        format_check(spans)
        for cause in breach_causes(syntax, clause, counts)
        for spans in span_sets(cause)
    }


def _attributes(node: Any) -> Iterator[str]:
    """The names of attributes anywhere in a syntax tree."""
    if isinstance(node, Attribute):
        if node.scope is not Scope.FIELD:
            yield node.name
    elif isinstance(node, tuple):
        for each in node:
            yield from _attributes(each)
    elif is_dataclass(node):
        for each in fields(node):
            yield from _attributes(getattr(node, each.name))
