"""How the rules were judged, counted by rule: what shows that a rule never applies."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.definition import Rule
from betrace.service.traces.decide import (
    O_KEPT,
    O_NOT_APPLICABLE,
    OUTCOMES,
    outcomes_when_empty,
)

OTHER = "(other)"  # no tenant or rule can have this name
_MOST_SETS = 1000  # versions of tenants' rules that are counted at a time


@dataclass(slots=True, eq=False)
class _RuleSet:
    """What was counted for one version of a tenant's rules since the last scrape."""

    tenant: str
    rules: CompiledRules
    outcomes: Rows
    traces: int = 0


class RuleEvaluations:
    """Counts verdicts on closed traces by tenant, rule and :data:`OUTCOMES`. Of a rule that relates
    spans, traces that cannot break it are kept, because its ``when`` is not evaluated for them.

    The series of an enabled rule exist, at zero, from the first scrape after the rule is loaded,
    and until the rule is deleted. There are at most ``most_series``; further rules are counted
    under the tenant and rule :data:`OTHER`. A batch costs one addition of arrays, however many
    traces it has. Methods may be called from any thread.
    """

    def __init__(self, most_series: int) -> None:
        self._most = max(most_series // len(OUTCOMES), 1)
        self._lock = threading.Lock()
        self._known: Mapping[str, tuple[Rule, ...]] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._free: list[int] = []
        self._counts = np.zeros((1, len(OUTCOMES)), np.int64)  # the first row is of the others
        self._sets: OrderedDict[tuple[str, str], _RuleSet] = OrderedDict()

    def add(self, tenant: str, rules: CompiledRules, outcomes: Rows, traces: int) -> None:
        """Count closed traces. ``outcomes`` has a row for each rule, with the number of traces by
        outcome; the other traces had no span that matters to the rule."""
        with self._lock:
            key = tenant, rules.version
            found = self._sets.get(key)
            if found is None or found.rules is not rules:
                self._new_set(key, rules)
                found = self._sets[key]
            found.outcomes += outcomes
            found.traces += traces

    def _new_set(self, key: tuple[str, str], rules: CompiledRules) -> None:
        if key in self._sets:
            self._take(self._sets.pop(key))
        elif len(self._sets) >= _MOST_SETS:
            self._take(self._sets.popitem(last=False)[1])
        outcomes = np.zeros((len(rules.rules), len(OUTCOMES)), np.int64)
        self._sets[key] = _RuleSet(key[0], rules, outcomes)

    def _take(self, found: _RuleSet) -> None:
        """Move what was counted to the series."""
        if found.traces and len(found.outcomes):
            ids = [rule.id for rule in found.rules.rules]
            rows = np.array([self._row(found.tenant, each) for each in ids], np.int64)
            empty = outcomes_when_empty(found.rules)
            for number in found.rules.relational:  # the fold knows candidates, not `when`
                found.outcomes[number, O_KEPT] += found.outcomes[number, O_NOT_APPLICABLE]
                found.outcomes[number, O_NOT_APPLICABLE] = 0
                empty[number] = max(empty[number], O_KEPT)
            untouched = found.traces - found.outcomes.sum(axis=1)
            np.add.at(self._counts, rows, found.outcomes)
            np.add.at(self._counts, (rows, empty), untouched)
        found.outcomes[:] = 0
        found.traces = 0

    def _row(self, tenant: str, rule_id: str) -> int:
        key = tenant, rule_id
        row = self._rows.get(key)
        if row is not None:
            return row
        if len(self._rows) >= self._most:
            return 0
        if not self._free:
            size = len(self._counts)
            grown = np.zeros((2 * size, len(OUTCOMES)), np.int64)
            grown[:size] = self._counts
            self._counts = grown
            self._free = list(range(2 * size - 1, size - 1, -1))
        row = self._rows[key] = self._free.pop()
        return row

    def counts(
        self, rules: Mapping[str, tuple[Rule, ...]]
    ) -> list[tuple[tuple[str, str, str], int]]:
        """The number of traces by tenant, rule and outcome. ``rules`` are the current rules by
        tenant, in a mapping that is replaced when they change."""
        with self._lock:
            for found in self._sets.values():
                self._take(found)
            if rules is not self._known:
                self._follow(rules)
            shown = [(key, self._counts[row].tolist()) for key, row in self._rows.items()]
            others = self._counts[0].tolist()
        if any(others):
            shown.append(((OTHER, OTHER), others))
        return [
            ((*key, outcome), number)
            for key, numbers in shown
            for outcome, number in zip(OUTCOMES, numbers, strict=True)
        ]

    def _follow(self, rules: Mapping[str, tuple[Rule, ...]]) -> None:
        """Add series of new rules at zero, and remove those of rules that no longer exist."""
        tenants = {tenant for tenant, _ in self._rows}
        ids = {tenant: {rule.id for rule in rules.get(tenant, ())} for tenant in tenants}
        for key in [key for key in self._rows if key[1] not in ids[key[0]]]:
            row = self._rows.pop(key)
            self._counts[row] = 0
            self._free.append(row)
        for tenant, own in sorted(rules.items()):
            for rule in own:
                if rule.enabled:
                    self._row(tenant, rule.id)
        self._known = rules
