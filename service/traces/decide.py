"""Decides rules from the counts of their checks.

While a trace is open its counts can only grow, so an expression is true, false or unknown (Kleene's
three-valued logic): with n spans so far, ``count(x) > k`` is true once n > k and unknown before. An
expression that is true or false stays so. On a closed trace everything is known, except whether a
pattern is found in a text that is too long: then a count is between two numbers.

Only the rules that a trace touches are evaluated, and those that a trace without any match breaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import Rows
from betrace.service.rules.compile import (
    AND,
    CONSTANT,
    COUNT_COUNT,
    COUNT_NUMBER,
    END,
    EQ,
    EXISTS,
    FALSE,
    GE,
    GT,
    LE,
    LT,
    NE,
    OR,
    R_ALWAYS,
    R_EARLY,
    R_EARLY_ON_EMPTY,
    R_NEVER,
    R_WHEN,
    TRUE,
    UNKNOWN,
    CompiledRules,
)
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    E_CHECK,
    E_COUNT,
    E_EVIDENCE,
    FLAGS,
    MAX_END,
    MIN_START,
    PARTIAL,
    SPANS,
)

ALWAYS_BROKEN, NEVER_BROKEN = 1, 2  # the clause that a breach breaks
UNSURE = 3  # in place of a clause: whether one is broken depends on texts that are too long
CLAUSES = {ALWAYS_BROKEN: "always", NEVER_BROKEN: "never"}

NOT_APPLICABLE = -1  # `when` does not hold

OUTCOMES = ("not_applicable", "kept", "broken", "undecided")
"""What a rule says of a closed trace; columns of the numbers of traces by rule."""
O_NOT_APPLICABLE, O_KEPT, O_BROKEN, O_UNDECIDED = range(4)
_NOT_COUNTED = np.zeros((0, len(OUTCOMES)), np.int64)  # for calls that count no outcomes

STACK = 512  # more than any rule of 16 KiB with 32 levels can need


@lean_kernel
def _truth(holds: bool) -> int:
    return TRUE if holds else FALSE


@lean_kernel
def _between(least: int, most: int, op: int, number: int) -> int:
    """The truth value of ``count op number`` for a count from ``least`` to ``most``."""
    if op == EQ or op == NE:
        if least <= number <= most:
            if least < most:
                return UNKNOWN
            return _truth(op == EQ)
        return _truth(op == NE)
    if op == LT:
        return TRUE if most < number else FALSE if least >= number else UNKNOWN
    return TRUE if least > number else FALSE if most <= number else UNKNOWN


@lean_kernel
def _count_number(count: int, op: int, number: int) -> int:
    """The truth value of ``count op number`` while the count can grow."""
    if op == GT:
        return TRUE if count > number else UNKNOWN
    if op == LT:
        return FALSE if count >= number else UNKNOWN
    if count > number:
        return FALSE if op == EQ else TRUE
    return UNKNOWN


@lean_kernel
def _count_count(least: int, most: int, op: int) -> int:
    """The truth value of ``left op right`` if their difference is from ``least`` to ``most``."""
    if op == LE or op == GE:
        opposite = _between(least, most, GT if op == LE else LT, 0)
        return TRUE - opposite
    return _between(least, most, op, 0)


@lean_kernel
def _count(entries: Rows, entry_of: Rows, number: int) -> int:
    return entries[entry_of[number], E_COUNT] if number >= 0 and entry_of[number] >= 0 else 0


@lean_kernel
def _run(
    programs: Rows,
    start: int,
    entries: Rows,
    entry_of: Rows,
    unknown_of: Rows,
    closed: bool,
    stack: Rows,
) -> int:
    """The truth value of a program. ``entry_of[check]`` is the row of the check's entry, or -1."""
    pc = start
    top = -1
    while programs[pc, 0] != END:
        op = programs[pc, 0]
        a = programs[pc, 1]
        if op == AND:
            top -= 1
            stack[top] = min(stack[top], stack[top + 1])
        elif op == OR:
            top -= 1
            stack[top] = max(stack[top], stack[top + 1])
        elif op <= CONSTANT:
            top += 1
            if op == CONSTANT:
                stack[top] = a
            elif op == EXISTS:
                if entry_of[a] >= 0:
                    stack[top] = TRUE
                elif closed and _count(entries, entry_of, unknown_of[a]) == 0:
                    stack[top] = FALSE
                else:
                    stack[top] = UNKNOWN
            elif op == COUNT_NUMBER:
                count = _count(entries, entry_of, a)
                if closed:
                    most = count + _count(entries, entry_of, unknown_of[a])
                    stack[top] = _between(count, most, programs[pc, 2], programs[pc, 3])
                else:
                    stack[top] = _count_number(count, programs[pc, 2], programs[pc, 3])
            elif not closed:
                stack[top] = UNKNOWN
            elif op == COUNT_COUNT:
                b = programs[pc, 3]
                difference = _count(entries, entry_of, a) - _count(entries, entry_of, b)
                stack[top] = _count_count(
                    difference - _count(entries, entry_of, unknown_of[b]),
                    difference + _count(entries, entry_of, unknown_of[a]),
                    programs[pc, 2],
                )
            else:  # BEFORE
                b = programs[pc, 2]
                if (
                    _count(entries, entry_of, unknown_of[a])
                    + _count(entries, entry_of, unknown_of[b])
                    > 0
                ):
                    stack[top] = UNKNOWN
                else:
                    stack[top] = _truth(
                        entry_of[a] >= 0
                        and entry_of[b] >= 0
                        and entries[entry_of[a], E_EVIDENCE] < entries[entry_of[b], E_EVIDENCE]
                    )
        else:  # NOT
            stack[top] = TRUE - stack[top]
        pc += 1
    return stack[top]


@lean_kernel
def _decide_rule(
    rule: Rows,
    programs: Rows,
    entries: Rows,
    entry_of: Rows,
    unknown_of: Rows,
    closed: bool,
    stack: Rows,
) -> int:
    """The clause that is certainly broken: ``when and (not always or never)``. Without one
    :data:`UNSURE` if the trace is closed and one may be broken, 0 if none is, or
    :data:`NOT_APPLICABLE` if ``when`` does not hold, or not certainly in an open trace."""
    when = _run(programs, rule[R_WHEN], entries, entry_of, unknown_of, closed, stack)
    if when == FALSE or (when == UNKNOWN and not closed):
        return NOT_APPLICABLE
    always = _run(programs, rule[R_ALWAYS], entries, entry_of, unknown_of, closed, stack)
    if when == TRUE and always == FALSE:
        return ALWAYS_BROKEN
    never = _run(programs, rule[R_NEVER], entries, entry_of, unknown_of, closed, stack)
    if when == TRUE and never == TRUE:
        return NEVER_BROKEN
    if closed and (always != TRUE or never != FALSE):
        return UNSURE
    return 0


@lean_kernel
def _decide(
    first: int,
    entries: Rows,
    starts: Rows,
    closed: bool,
    skip_early: bool,
    rule_rows: Rows,
    programs: Rows,
    rules_of: Rows,
    rules_of_starts: Rows,
    on_empty: Rows,
    entry_of: Rows,
    unknown_of: Rows,
    stamps: Rows,
    stack: Rows,
    out: Rows,
    outcomes: Rows,
) -> tuple[int, int]:
    """Decide the traces from ``first`` on. Returns ``(next trace, breaches)``, with rows (trace,
    rule, clause) in ``out``, and adds to ``outcomes``, unless it is empty, for the rules that were
    looked at. Stops before a trace whose breaches might not fit; ``out`` must have a row for each
    rule at least."""
    found = 0
    n_rules = len(rule_rows)
    counting = len(outcomes) > 0
    for k in range(first, len(starts) - 1):
        if found + n_rules > len(out):
            return k, found
        for e in range(starts[k], starts[k + 1]):
            entry_of[entries[e, E_CHECK]] = e
        for e in range(starts[k], starts[k + 1] + 1):
            own = e < starts[k + 1]
            if own:
                check = entries[e, E_CHECK]
                lo = rules_of_starts[check]
                hi = rules_of_starts[check + 1]
            elif closed:
                lo = 0
                hi = len(on_empty)
            else:
                break
            for i in range(lo, hi):
                r = rules_of[i] if own else on_empty[i]
                if stamps[r] == k + 1:
                    continue
                stamps[r] = k + 1
                rule = rule_rows[r]
                clause = _decide_rule(rule, programs, entries, entry_of, unknown_of, closed, stack)
                if counting:
                    outcomes[r, O_UNDECIDED if clause == UNSURE else min(clause, 1) + 1] += 1
                if (
                    clause > 0
                    and skip_early
                    and rule[R_EARLY]
                    and not rule[R_EARLY_ON_EMPTY]
                    and _decide_rule(rule, programs, entries, entry_of, unknown_of, False, stack)
                    > 0
                ):
                    continue
                if clause > 0:
                    out[found, 0] = k
                    out[found, 1] = r
                    out[found, 2] = clause
                    found += 1
        for e in range(starts[k], starts[k + 1]):
            entry_of[entries[e, E_CHECK]] = -1
    return len(starts) - 1, found


@dataclass(frozen=True, slots=True)
class Breach:
    """Trace number ``trace`` of a :class:`DueTraces` breaks rule number ``rule``."""

    trace: int
    rule: int
    clause: int  # ALWAYS_BROKEN or NEVER_BROKEN; UNSURE where it is said
    early: bool


def decide(due: DueTraces, *, raised_early: bool = True) -> list[Breach]:
    """All breaches that the fold can tell and that are certain.

    For closed traces, breaches that were certain before the end are left out, because they were
    raised at that time. ``raised_early=False`` includes them.
    """
    return decide_or_ask(due, raised_early=raised_early)[0]


def outcomes_when_empty(rules: CompiledRules) -> Rows:
    """The outcome of each rule for a closed trace without any matching span."""
    entries = np.zeros((0, E_EVIDENCE + 1), np.int64)
    entry_of = np.full(rules.counters + 1, -1, np.int64)
    stack = np.zeros(STACK, np.int64)
    programs, unknown_of = rules.programs, rules.unknown_of
    clauses = [
        _decide_rule(row, programs, entries, entry_of, unknown_of, True, stack)
        for row in rules.rule_rows
    ]
    return np.array([min(clause, 1) + 1 for clause in clauses], np.int64)


def decide_or_ask(
    due: DueTraces, *, raised_early: bool = True, outcomes: Rows | None = None
) -> tuple[list[Breach], list[Breach], list[Breach]]:
    """The breaches, as :func:`decide` returns them; the candidates, which are traces that may break
    a relational rule, or one that skips incomplete traces, and must be read back to tell; and those
    of which nobody can tell (:data:`UNSURE`), because a text is too long. Adds the number of traces
    by rule and outcome to ``outcomes``: candidates as broken, and only the rules that a trace has
    spans for."""
    found = _certain(due, raised_early, outcomes)
    read_back = due.rules.read_back
    unsure = [each for each in found if each.clause == UNSURE]
    if unsure:
        found = [each for each in found if each.clause != UNSURE]
    if not read_back:
        return found, [], unsure
    breaches: list[Breach] = []
    candidates: list[Breach] = []
    for each in found:
        if each.rule not in read_back:
            breaches.append(each)
        elif _is_large_enough(due, each):
            candidates.append(each)
        elif outcomes is not None:
            outcomes[each.rule, O_BROKEN] -= 1
            outcomes[each.rule, O_KEPT] += 1
    return breaches, candidates, unsure


def _is_large_enough(due: DueTraces, candidate: Breach) -> bool:
    """Whether a trace has the spans and the duration that breaking the rule takes."""
    row = due.rows[candidate.trace]
    if row[FLAGS] & PARTIAL:  # some of its spans were not counted
        return True
    spans, duration = int(row[SPANS]), max(0, int(row[MAX_END] - row[MIN_START]))
    return any(
        spans >= each.spans and duration >= each.duration
        for each in due.rules.least[candidate.rule]
    )


def _certain(due: DueTraces, raised_early: bool, outcomes: Rows | None) -> list[Breach]:
    rules: CompiledRules = due.rules
    n_rules = len(rules.rules)
    if not len(due) or not n_rules:
        return []
    values, value_starts = rules.rules_of if due.closed else rules.early_of
    entry_of = np.full(rules.counters + 1, -1, np.int64)
    stamps = np.zeros(n_rules, np.int64)
    stack = np.empty(STACK, np.int64)
    out = np.empty((max(n_rules, 1024), 3), np.int64)
    if outcomes is None:
        outcomes = _NOT_COUNTED
    breaches: list[Breach] = []
    at = 0
    while at < len(due):
        at, found = _decide(
            at,
            due.entries,
            due.starts,
            due.closed,
            due.closed and raised_early,
            rules.rule_rows,
            rules.programs,
            values,
            value_starts,
            rules.on_empty,
            entry_of,
            rules.unknown_of,
            stamps,
            stack,
            out,
            outcomes,
        )
        breaches.extend(
            Breach(int(k), int(r), int(clause), not due.closed) for k, r, clause in out[:found]
        )
    return breaches


def broken(due: DueTraces) -> tuple[list[dict[tuple[str, str], str]], list[set[tuple[str, str]]]]:
    """For each trace, the rules (id, version) that it breaks with the broken clause, and the rules
    of which nobody can tell."""
    found: list[dict[tuple[str, str], str]] = [{} for _ in range(len(due))]
    unknown: list[set[tuple[str, str]]] = [set() for _ in range(len(due))]
    breaches, _, unsure = decide_or_ask(due, raised_early=False)
    for breach in breaches:
        rule = due.rules.rules[breach.rule]
        found[breach.trace][rule.id, rule.version] = CLAUSES[breach.clause]
    for each in unsure:
        rule = due.rules.rules[each.rule]
        unknown[each.trace].add((rule.id, rule.version))
    return found, unknown
