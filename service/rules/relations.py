"""Judges a relational rule on a whole trace: group by group, with the groups that broke it.

A rule is *undecided* if it needs too much work, or depends on the search of a text that is too
long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from betrace.service.rules import exact
from betrace.service.rules.evaluation import Evaluation
from betrace.service.rules.exact import UnknownError
from betrace.service.rules.format import format_check, format_ref
from betrace.service.rules.syntax import ForEach, RuleSyntax, SpanSet, span_sets
from betrace.service.rules.trace_tree import TraceTree
from betrace.service.rules.workspace import FOREVER, Group, TooMuchWorkError, Workspace

SHOWN = 5  # groups, and spans of each


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result for one trace. ``clause`` is the broken one (always | never), None without a
    breach. ``undecided`` says why nothing is known. ``groups`` are JSON: how many were ``broken``,
    ``of`` how many, and ``examples`` of broken ones with ``key``, ``clause`` and ``spans``."""

    clause: str | None
    undecided: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    evidence: dict[str, list[str]] = field(default_factory=dict)
    groups: dict[str, Any] | None = None


def judge(
    rule: RuleSyntax,
    trace: TraceTree,
    *,
    until: float = FOREVER,
    depends: dict[int, bool] | None = None,
) -> Judgement:
    """The verdict of a relational rule on a trace; undecided if it is not found by the time
    ``until`` of :func:`time.monotonic`. ``depends`` is scratch that may be kept with the rule."""
    word = rule.for_each.word if rule.for_each else None
    depends = {} if depends is None else depends
    judging = _Judging(rule, Workspace(trace, word, until, depends))
    try:
        return judging.run()
    except TooMuchWorkError as error:
        return Judgement(None, str(error))
    except UnknownError as error:
        return Judgement(None, str(error))


class _Judging:
    """One rule and one trace."""

    def __init__(self, rule: RuleSyntax, run: Workspace) -> None:
        self._rule = rule
        self._word = run.word
        self._run = run
        self._evaluation = Evaluation(self._run)

    def run(self) -> Judgement:
        rule = self._rule
        if rule.when is not None and not self._evaluation.holds(rule.when):
            return Judgement(None)
        if rule.for_each is None:
            clause = self._clause()
            return self._judgement(clause, None) if clause else Judgement(None)
        groups = self._groups(rule.for_each)
        broken: list[tuple[Group, str]] = []
        unknown: UnknownError | None = None
        for group in groups:
            self._run.enter(group)
            try:
                clause = self._clause()
            except UnknownError as error:
                unknown = error
                continue
            if clause:
                broken.append((group, clause))
        if not broken:
            if unknown is not None:
                raise unknown
            return Judgement(None)
        clauses = {clause for _, clause in broken}
        shown = {
            "broken": len(broken),
            "of": len(groups),
            "examples": [_example(group, clause) for group, clause in broken[:SHOWN]],
        }
        return self._judgement("always" if "always" in clauses else "never", shown)

    def _clause(self) -> str | None:
        """The broken clause: unknown only if neither is certainly broken."""
        unknown: UnknownError | None = None
        for name, node in (("always", self._rule.always), ("never", self._rule.never)):
            if node is None:
                continue
            try:
                if self._evaluation.holds(node) == (name == "never"):
                    return name
            except UnknownError as error:
                unknown = error
        if unknown is not None:
            raise unknown
        return None

    def _judgement(self, clause: str, groups: dict[str, Any] | None) -> Judgement:
        """Counts and evidence of the span sets that are the same for all groups."""
        rule = self._rule
        sets: dict[SpanSet, None] = {}
        if rule.for_each is not None:
            sets[rule.for_each.spans] = None
        for part in (rule.when, rule.always, rule.never):
            sets.update(dict.fromkeys(span_sets(part)))
        counts: dict[str, int] = {}
        evidence: dict[str, list[str]] = {}
        for spans in sets:
            if spans.bound or self._run.is_dependent(spans):
                continue
            name = format_check(spans, self._word)
            try:
                found = self._evaluation.select(spans)
            except UnknownError:
                continue
            counts[name] = len(found)
            if found:
                evidence[name] = [span.id for span in found[:SHOWN]]
        return Judgement(clause, None, counts, evidence, groups)

    def _groups(self, each: ForEach) -> list[Group]:
        spans = self._evaluation.select(each.spans)
        if not each.by:
            return [Group([span]) for span in spans]
        found: dict[tuple[str, ...], Group] = {}
        for span in spans:
            values = [self._evaluation.value(ref, span, None) for ref in each.by]
            keys = [exact.key(value) for value in values]
            present = tuple(key for key in keys if key is not None)
            if len(present) < len(keys):
                continue
            group = found.get(present)
            if group is None:
                found[present] = Group([span], dict(zip(each.by, values, strict=True)))
                continue
            group.spans.append(span)
            for ref, value in zip(each.by, values, strict=True):
                if exact.is_number(value):
                    group.values[ref] = value  # type: ignore[index]
        return list(found.values())


def _example(group: Group, clause: str) -> dict[str, Any]:
    return {
        "key": {
            format_ref(ref).removeprefix("."): exact.text(value)
            for ref, value in group.values.items()
        },
        "clause": clause,
        "spans": [span.id for span in group.spans[:SHOWN]],
    }
