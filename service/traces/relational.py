"""Decides relational rules: reads candidates back and judges them, and knows what was signalled.

The fold knows from the counts of a closed trace what it signalled when the trace was closed before.
For relational rules it does not, so their signals are remembered here, for the traces that have
some, and after a restart are read from the query store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from cachetools import LRUCache

from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.definition import SKIP
from betrace.service.rules.relations import Judgement, judge
from betrace.service.rules.workspace import FOREVER
from betrace.service.signals import Kind, Signal
from betrace.service.traces.decide import ALWAYS_BROKEN, NEVER_BROKEN, Breach
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import FLAGS, REOPENED
from betrace.service.traces.reading_pace import ReadingPace
from betrace.service.traces.screen import Screen
from betrace.service.traces.signal_history import (
    RuleSignals,
    SignalHistory,
    history_from_json,
    history_to_json,
    merged,
)
from betrace.service.traces.whole_trace import WholeTrace

REMEMBERED = 100_000  # traces with signals of relational rules

ReadTraces = Callable[[DueTraces, Sequence[int]], Iterable[Sequence[tuple[int, WholeTrace | str]]]]
"""Reads traces by number, in rounds; in place of one that cannot be read whole, the reason."""

SignalsOf = Callable[[str, Sequence[str]], "dict[str, SignalHistory] | None"]
"""The stored signals of a tenant's traces, by trace id; None if the store cannot be asked."""


@dataclass(frozen=True, slots=True)
class Undecided:
    """Trace number ``trace`` may break rule number ``rule``, but nobody can tell."""

    trace: int
    rule: int
    reason: str


@dataclass(slots=True)
class Judged:
    """The results for the candidates among some traces."""

    breaches: list[tuple[Breach, Judgement | None]]
    """Those of rules without relations have no judgement."""
    undecided: list[Undecided]
    skipped: dict[tuple[int, int], int] = field(default_factory=dict)
    """For incomplete traces (trace, rule) of rules that skip them: how many parents are missing."""
    missing: dict[int, int] = field(default_factory=dict)
    """How many parents are missing in each closed trace with a breach, perhaps 0."""


class RelationalRules:
    """Judges candidates, and remembers the signals of relational rules. What is not judged within
    ``seconds`` of one call is undecided. ``pace`` bounds the reading of open traces."""

    def __init__(
        self,
        read: ReadTraces,
        signals_of: SignalsOf = lambda tenant, trace_ids: {},
        seconds: float = FOREVER,
        pace: ReadingPace | None = None,
    ) -> None:
        self._read = read
        self._signals_of = signals_of
        self._seconds = seconds
        self._lock = threading.Lock()  # a thread that takes too long is left behind
        self._pace = pace or ReadingPace()
        self._screen = Screen()
        self._depends: WeakKeyDictionary[CompiledRules, dict[int, bool]] = WeakKeyDictionary()
        self._emitted: LRUCache[tuple[str, str], SignalHistory] = LRUCache(REMEMBERED)

    def judge(self, due: DueTraces, candidates: Sequence[Breach]) -> Judged:
        """Read the candidates' traces, each once, and judge them. Of traces that are still open,
        judge what no later span can undo, if there is time for it."""
        of = {(each.trace, each.rule): each for each in candidates}
        wanted: dict[int, list[int]] = {}
        for each in candidates:
            wanted.setdefault(each.trace, []).append(each.rule)
        if due.closed:
            self._pace.closed(due, wanted)
        else:
            wanted = self._pace.chosen(due, wanted)
        chosen = dict(wanted)
        judged = Judged([], [])
        started = time.thread_time()
        until = time.monotonic() + self._seconds
        for round_ in self._read(due, list(wanted)) if wanted else ():
            kept = self._screen.kept(due, round_, wanted, until)
            for k, found in round_:
                for number in wanted.pop(k, ()):
                    if (k, number) not in kept:
                        self._add(judged, due, of[k, number], found, until)
        for k, numbers in wanted.items():
            for number in numbers:
                self._add(judged, due, of[k, number], "the trace was not found", until)
        if not due.closed:
            breaches = [each for each, _ in judged.breaches]
            self._pace.note(due, chosen, breaches, time.thread_time() - started)
            judged.undecided.clear()  # decided when the trace closes
        return judged

    def _add(
        self,
        judged: Judged,
        due: DueTraces,
        candidate: Breach,
        found: WholeTrace | str,
        until: float,
    ) -> None:
        k, number = candidate.trace, candidate.rule
        rules = due.rules
        rule = rules.rules[number]
        if isinstance(found, str):
            judged.undecided.append(Undecided(k, number, found))
            return
        if rule.incomplete == SKIP and found.missing_parents:
            judged.skipped[k, number] = found.missing_parents
            return
        if not rule.syntax.relational:
            judged.breaches.append((candidate, None))
            judged.missing[k] = found.missing_parents
            return
        judgement = judge(
            rule.syntax if due.closed else rules.early_rules[number],
            found.tree,
            until=until,
            depends=self._depends.setdefault(rules, {}),
        )
        if judgement.undecided is not None:
            judged.undecided.append(Undecided(k, number, judgement.undecided))
        elif judgement.clause is not None:
            clause = ALWAYS_BROKEN if judgement.clause == "always" else NEVER_BROKEN
            judged.breaches.append((Breach(k, number, clause, not due.closed), judgement))
            if due.closed:
                judged.missing[k] = found.missing_parents

    def histories(self, due: DueTraces) -> tuple[dict[int, SignalHistory], set[int]]:
        """The signals of the traces that were closed before: those that came with them, those
        remembered, and those stored; and the traces of which they cannot be known now."""
        found = dict(due.signal_history)
        again = np.flatnonzero(due.rows[:, FLAGS] & REOPENED).tolist()
        ids = {k: due.trace_id(k) for k in again}
        stored = self._signals_of(due.tenant, list(ids.values())) if ids else {}
        if stored is None:
            return found, set(again)
        for k, trace_id in ids.items():
            with self._lock:
                emitted = self._emitted.get((due.tenant, trace_id), {})
            known = merged(stored.get(trace_id, {}), emitted)
            if known:
                found[k] = merged(found.get(k, {}), known)
        return found, set()

    def note(self, due: DueTraces, signals: Iterable[Signal]) -> None:
        """Remember signals that were made of these traces."""
        relational = due.rules.identities - due.rules.folded
        for signal in signals:
            rule = (signal.rule_id, signal.rule_version)
            if rule in relational:
                emitted = 2 * signal.episode + (1 if signal.kind is Kind.RAISED else 2)
                at = (signal.tenant, signal.trace_id)
                own = {rule: RuleSignals(emitted, signal.clause)}
                with self._lock:
                    self._emitted[at] = merged(self._emitted.get(at, {}), own)

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        self._pace.forget(tenant)
        with self._lock:
            for key in [key for key in self._emitted if key[0] == tenant]:
                self._emitted.pop(key, None)

    def saved(self) -> list[list[Any]]:
        """The remembered signals as JSON, for a snapshot: rows (tenant, trace, history)."""
        with self._lock:
            return [[*at, history_to_json(each)] for at, each in self._emitted.items()]

    def restore(self, saved: Iterable[Sequence[Any]]) -> None:
        """Add what :meth:`saved` returned."""
        with self._lock:
            for tenant, trace_id, history in saved:
                self._emitted[tenant, trace_id] = history_from_json(history)
