"""Finds the candidates that keep a relational rule, many at once, so that only the others are
judged span by span."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from betrace.service.rules.column_rules import ColumnRule
from betrace.service.rules.column_values import UnsupportedError
from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.definition import SKIP
from betrace.service.traces.due import DueTraces
from betrace.service.traces.whole_trace import WholeTrace

LEAST_SPANS = 40  # of the candidates of a rule: to judge fewer one by one takes less time


class Screen:
    """Judges rules in columns (:mod:`betrace.service.rules.column_rules`), if their candidates have
    ``least_spans`` together."""

    def __init__(self, least_spans: int = LEAST_SPANS) -> None:
        self._least = least_spans
        self._rules: WeakKeyDictionary[CompiledRules, dict[tuple[int, bool], ColumnRule | None]] = (
            WeakKeyDictionary()
        )

    def kept(
        self,
        due: DueTraces,
        read: Sequence[tuple[int, WholeTrace | str]],
        wanted: Mapping[int, Sequence[int]],
        until: float,
    ) -> set[tuple[int, int]]:
        """The pairs (trace, rule) in which the trace certainly keeps the rule. ``wanted`` has the
        rules by trace. Of open traces, the early rules are judged. No rule is begun after the time
        ``until`` of :func:`time.monotonic`."""
        by_rule: dict[int, list[tuple[int, WholeTrace]]] = {}
        for k, found in read:
            if isinstance(found, WholeTrace):
                for number in wanted.get(k, ()):
                    by_rule.setdefault(number, []).append((k, found))
        kept: set[tuple[int, int]] = set()
        for number, candidates in by_rule.items():
            columns = candidates[0][1].columns
            if sum(columns.size(found.number) for _, found in candidates) < self._least:
                continue
            rule = self._rule(due, number)
            if rule is None or time.monotonic() > until:
                continue
            part = columns.take(np.array([found.number for _, found in candidates]))
            may_break = rule.run(part).may_break.tolist()
            kept.update(
                (k, number) for (k, _), may in zip(candidates, may_break, strict=True) if not may
            )
        return kept

    def _rule(self, due: DueTraces, number: int) -> ColumnRule | None:
        known = self._rules.setdefault(due.rules, {})
        key = number, due.closed
        if key not in known:
            known[key] = self._compile(due, number)
        return known[key]

    @staticmethod
    def _compile(due: DueTraces, number: int) -> ColumnRule | None:
        rule = due.rules.rules[number]
        if not rule.syntax.relational or rule.incomplete == SKIP:
            return None
        try:
            return ColumnRule(rule.syntax if due.closed else due.rules.early_rules[number])
        except UnsupportedError:
            return None
