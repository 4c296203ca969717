"""Signals and retractions from decided traces: pure functions of what is due."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.rules.definition import SHADOW, Rule
from betrace.service.rules.patterns import TOO_LONG
from betrace.service.rules.relations import Judgement
from betrace.service.rules.wording import breach_text, counts_text
from betrace.service.signals import (
    MISSING_PARENTS,
    MODE,
    SERVICE,
    Kind,
    Signal,
    incomplete_text,
    signal_id,
)
from betrace.service.traces.decide import (
    ALWAYS_BROKEN,
    CLAUSES,
    NEVER_BROKEN,
    O_BROKEN,
    O_KEPT,
    O_UNDECIDED,
    OUTCOMES,
    Breach,
    decide,
    decide_or_ask,
)
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    E_CHECK,
    E_COUNT,
    E_EVIDENCE,
    EVIDENCE,
    FLAGS,
    PARTIAL,
    REOPENED,
)
from betrace.service.traces.relational import Judged, RelationalRules, Undecided
from betrace.service.traces.signal_history import RuleVersion, SignalHistory, active_elsewhere

_MASK = 2**64 - 1
_NO_SOURCE = "the spans of the trace are not kept"
_NO_HISTORY = "its earlier signals cannot be read, because DuckDB is not available"
_CHANGED = "spans that arrived after the trace was closed changed the verdict"


@dataclass(slots=True, eq=False)
class Decided:
    """What must be stored: signals, and the traces that were closed (None if none were)."""

    tenant: str
    signals: list[Signal]
    closed: DueTraces | None
    spilled: Rows | None = None
    due_ns: int = 0
    """When the last relevant span was received, or the trace was closed."""

    ticket: int = 0
    """The ticket of this work in the pipeline, 0 for none."""

    undecided: list[Undecided] = field(default_factory=list)
    """Closed traces that may break rules, but could not be judged."""

    missing: dict[int, int] = field(default_factory=dict)
    """How many parents are missing, by number of the closed trace, where judging found it out."""

    outcomes: Rows | None = None
    """For closed traces, the number of traces by rule and outcome, see
    :data:`betrace.service.traces.decide.OUTCOMES`."""

    @property
    def weight(self) -> int:
        """Rows to write, at least 1."""
        traces = 0 if self.closed is None else len(self.closed)
        return len(self.signals) + traces or 1


def decide_due(due: DueTraces, now: int, relational: RelationalRules | None = None) -> Decided:
    """The signals of traces that are due; ``now`` becomes their ``detected_at``.

    ``relational`` decides the rules that the fold cannot; without it they are undecided. Once the
    signals are passed on, the caller notes them there.
    """
    outcomes = np.zeros((len(due.rules.rules), len(OUTCOMES)), np.int64) if due.closed else None
    breaches, candidates, unsearched = decide_or_ask(due, outcomes=outcomes)
    spilled = due.spilled if due.spilled is not None and len(due.spilled) else None
    if not (due.closed or breaches or candidates):  # most of the traces that are looked at early
        return Decided(due.tenant, [], None, spilled, due.received_ns, due.ticket)
    histories: Mapping[int, SignalHistory] = due.signal_history
    judged = Judged([], [])
    unknown: set[int] = set()
    if relational is not None and candidates and not due.closed:
        judged = relational.judge(due, candidates)
    elif due.closed and due.rules.read_back and relational is not None:
        histories, unknown = relational.histories(due)
        judged = relational.judge(due, [each for each in candidates if each.trace not in unknown])
        judged.undecided += [
            Undecided(each.trace, each.rule, _NO_HISTORY)
            for each in candidates
            if each.trace in unknown
        ]
    elif candidates and due.closed:
        judged.undecided += [Undecided(each.trace, each.rule, _NO_SOURCE) for each in candidates]
    if outcomes is not None and candidates:
        _correct(outcomes, candidates, judged)
    judged.undecided += [Undecided(each.trace, each.rule, TOO_LONG) for each in unsearched]
    judgements = {(each.trace, each.rule): judgement for each, judgement in judged.breaches}
    unsure = {(each.trace, each.rule) for each in judged.undecided}
    unsure |= {(k, number) for k in unknown for number in due.rules.read_back}
    breaches += [each for each, _ in judged.breaches]
    found = _found(due, breaches, histories, judgements, unsure)
    signals = [
        _signal(due, breach, now, kind, episode, judgements.get((breach.trace, breach.rule)))
        for breach, kind, episode in found
    ]
    return Decided(
        due.tenant,
        signals,
        due if due.closed and len(due) else None,
        spilled,
        due.received_ns,
        due.ticket,
        judged.undecided,
        judged.missing,
        outcomes,
    )


def _correct(outcomes: Rows, candidates: list[Breach], judged: Judged) -> None:
    """Count candidates by what was found, and no longer as broken."""
    for each in candidates:
        outcomes[each.rule, O_BROKEN] -= 1
        outcomes[each.rule, O_KEPT] += 1
    for broken, _ in judged.breaches:
        outcomes[broken.rule, O_KEPT] -= 1
        outcomes[broken.rule, O_BROKEN] += 1
    for unsure in judged.undecided:
        outcomes[unsure.rule, O_KEPT] -= 1
        outcomes[unsure.rule, O_UNDECIDED] += 1


def raise_signal(
    due: DueTraces, breach: Breach, now: int, judgement: Judgement | None = None
) -> Signal:
    """The signal of a breach that was never raised before."""
    return _signal(due, breach, now, Kind.RAISED, 0, judgement)


def _found(
    due: DueTraces,
    breaches: list[Breach],
    histories: Mapping[int, SignalHistory],
    judgements: Collection[tuple[int, int]],
    unsure: Collection[tuple[int, int]],
) -> Iterator[tuple[Breach, Kind, int]]:
    """What to signal, each with its episode. A breach whose signal is active is signalled again:
    the id is the same, so it is recorded only if it was missing. ``judgements`` and ``unsure`` are
    the pairs (trace, rule) of the rules that were read back: those broken, and those that may
    be."""
    rules = due.rules.rules
    broken: dict[int, set[RuleVersion]] = {}  # by trace that was closed before
    if due.closed:
        again = np.flatnonzero(due.rows[:, FLAGS] & REOPENED).tolist()
        broken = {k: set() for k in [*again, *histories]}
    if broken:
        named = {(breach.trace, breach.rule) for breach in breaches}
        for breach in decide(due, raised_early=False):
            if (k := breach.trace) in broken:
                rule = rules[breach.rule]
                broken[k].add((rule.id, rule.version))
                before = histories.get(k, {}).get((rule.id, rule.version))
                if (k, breach.rule) not in named and not (before and before.active):
                    # Certain early now, but perhaps not when it was folded under other rules.
                    breaches.append(breach)
        for k, number in (*judgements, *unsure):
            if k in broken:  # what may still hold is not retracted
                broken[k].add((rules[number].id, rules[number].version))
    elsewhere = {k: active_elsewhere(known, due.rules.identities) for k, known in histories.items()}
    for breach in breaches:
        rule = rules[breach.rule]
        if rule.id not in elsewhere.get(breach.trace, ()):
            before = histories.get(breach.trace, {}).get((rule.id, rule.version))
            yield breach, Kind.RAISED, before.emitted // 2 if before else 0
    for k, known in histories.items() if due.closed else ():
        for number, rule in enumerate(rules):
            before = known.get((rule.id, rule.version))
            if before and before.active and (rule.id, rule.version) not in broken[k]:
                clause = ALWAYS_BROKEN if before.clause == "always" else NEVER_BROKEN
                yield Breach(k, number, clause, early=False), Kind.RETRACTED, before.emitted // 2


def _signal(
    due: DueTraces,
    breach: Breach,
    now: int,
    kind: Kind,
    episode: int,
    judgement: Judgement | None = None,
) -> Signal:
    rules = due.rules
    rule = rules.rules[breach.rule]
    trace_id = due.trace_id(breach.trace)
    first, last = due.starts[breach.trace], due.starts[breach.trace + 1]
    by_check = {int(row[E_CHECK]): row for row in due.entries[first:last]}
    counts: dict[str, int] = {}
    evidence: dict[str, list[str]] = {}
    checks = () if breach.rule in rules.relational else rules.checks_of_rule[breach.rule]
    for check in checks:
        name = rules.check_names[check]
        row = by_check.get(check)
        counts[name] = 0 if row is None else int(row[E_COUNT])
        if row is not None:
            kept = min(counts[name], EVIDENCE)
            ids = row[E_EVIDENCE + 1 : E_EVIDENCE + 2 * kept : 2]
            evidence[name] = [f"{int(span_id) & _MASK:016x}" for span_id in ids]
    if judgement is not None:
        counts, evidence = dict(judgement.counts), dict(judgement.evidence)
    clause = CLAUSES[breach.clause]
    return Signal(
        id=signal_id(due.tenant, rule.id, rule.version, trace_id, kind, episode),
        tenant=due.tenant,
        rule_id=rule.id,
        rule_version=rule.version,
        severity=str(rule.severity),
        kind=kind,
        clause=clause,
        trace_id=trace_id,
        detected_at=now,
        early=breach.early,
        counts=counts,
        evidence=evidence,
        message=_message(rule, clause, counts, kind, judgement),
        labels=dict(rule.labels),
        reason=_CHANGED if kind is Kind.RETRACTED else _caveat(due, breach.trace),
        context=_context(due, breach.trace, rule, judgement),
        episode=episode,
    )


def _message(
    rule: Rule, clause: str, counts: dict[str, int], kind: Kind, judgement: Judgement | None
) -> str:
    if kind is Kind.RETRACTED:
        found = f" ({counts_text(counts)})" if counts else ""
        return f"{rule.name}: no longer broken{found}"
    groups = judgement.groups if judgement is not None else None
    return f"{rule.name}: {breach_text(rule.syntax, clause, counts, groups)}"


def _caveat(due: DueTraces, k: int) -> str | None:
    if due.rows[k, FLAGS] & PARTIAL:
        return "the trace is partial: some of its earlier spans were not counted"
    return None


def marked_incomplete(signal: Signal, missing: int) -> Signal:
    """The signal of a trace in which so many parents are missing."""
    text = incomplete_text(missing)
    reason = text if signal.reason is None else f"{signal.reason}; {text}"
    return replace(
        signal, reason=reason, context={**(signal.context or {}), MISSING_PARENTS: missing}
    )


def _context(
    due: DueTraces, k: int, rule: Rule, judgement: Judgement | None
) -> dict[str, Any] | None:
    found = _window(due, k) or {}
    if judgement is not None and judgement.groups is not None:
        found["groups"] = judgement.groups
    if rule.mode == SHADOW:
        found[MODE] = SHADOW
    if service := due.service(k):
        found[SERVICE] = service
    return found or None


def _window(due: DueTraces, k: int) -> dict[str, Any] | None:
    context = due.contexts.get(k)
    if context is None:
        return None
    return {
        "window": context.window,
        "first": context.first,
        "last": context.first + len(context.spans) - 1,
        "spans": [f"{span_id & _MASK:016x}" for span_id in context.spans],
    }
