"""Compiles a tenant's rules to the distinct checks they contain.

A *check* is a :class:`~betrace.service.rules.syntax.SpanSet`: a span name and a predicate. Folding
a span means finding the checks it satisfies; deciding a rule means running its small program over
the checks' counts. Both work on the arrays built here.

Counts only grow while a trace is open, so each atom of a rule changes its truth value at known
counts, its *thresholds*. An early decision is worthwhile only when a count crosses one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.wire import hash_text
from betrace.service.rules.candidates import Bound, candidate
from betrace.service.rules.definition import SKIP, Rule, make_rule
from betrace.service.rules.early import early
from betrace.service.rules.format import format_check
from betrace.service.rules.least import Alternatives, Least, least
from betrace.service.rules.names import NameTable
from betrace.service.rules.patterns import PatternSearch, has_pattern
from betrace.service.rules.program import ProgramBuilder
from betrace.service.rules.syntax import (
    And,
    Before,
    CountCompare,
    Exists,
    Node,
    Not,
    Number,
    Or,
    RuleSyntax,
    SpanSet,
    span_sets,
)

# Instructions of a rule program: rows (op, a, b, c) for a stack of three-valued truth values.
EXISTS, COUNT_NUMBER, COUNT_COUNT, BEFORE, CONSTANT, AND, OR, NOT, END = range(9)
FALSE, UNKNOWN, TRUE = range(3)

# Comparison codes in the programs.
EQ, NE, LT, LE, GT, GE = range(6)
_OPS = {"==": EQ, "!=": NE, "<": LT, "<=": LE, ">": GT, ">=": GE}
_MIRRORED = {EQ: EQ, NE: NE, LT: GT, LE: GE, GT: LT, GE: LE}

# Columns of a rule row: where its three programs start, and how it may be decided.
(R_WHEN, R_ALWAYS, R_NEVER, R_EARLY, R_ON_EMPTY, R_EARLY_ON_EMPTY) = range(6)
RULE_COLUMNS = 6


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class CompiledRules:
    """One version of a tenant's rules, as the fold and the decision need them.

    ``predicates[c]`` is the program of check ``c`` in ``code``, or -1 if every span with its name
    satisfies it. ``rule_rows`` points into ``programs``. ``rules_of``, ``early_of`` and
    ``thresholds`` are concatenated lists: those of check ``c`` are
    ``values[starts[c]:starts[c + 1]]``. ``rules_of`` has all rules of a check, ``early_of`` those
    that may be decided early (except rules that every trace breaks from its beginning, which are
    decided at its end), and ``thresholds`` the counts at which such a rule can change its truth
    value. ``on_empty`` are the rules that a trace without any matching span breaks.

    The program of a relational rule decides whether a trace is a candidate for it: see
    :mod:`betrace.service.rules.candidates`.
    """

    rules: tuple[Rule, ...]
    version: str
    checks: tuple[SpanSet, ...]
    check_names: tuple[str, ...]
    names: NameTable
    predicates: Rows
    code: Rows
    leaves: Rows
    text: Bytes
    rule_rows: Rows
    programs: Rows
    rules_of: tuple[Rows, Rows]
    early_of: tuple[Rows, Rows]
    thresholds: tuple[Rows, Rows]
    on_empty: Rows
    checks_of_rule: tuple[tuple[int, ...], ...]
    relational: frozenset[int]
    """The numbers of the rules that relate spans: their candidates are read back and judged."""
    read_back: frozenset[int]
    """The numbers of the rules whose breaches are certain only once the trace is read back: those
    that relate spans, and those that skip incomplete traces."""
    early_rules: dict[int, RuleSyntax]
    """Of relational rules, by number, what can be decided while a trace is open."""
    unknown_of: Rows
    """For each check with a pattern the number, after those of the checks, under which spans are
    counted whose text is too long for it; -1 for other checks."""
    watched: Rows
    """1 for each check that may show that such a rule is broken: then the trace is read again
    whenever spans arrive."""
    least: tuple[Alternatives, ...]
    """Of each rule, how many spans and what duration its candidates have at least."""
    patterns: PatternSearch
    identities: frozenset[tuple[str, str]]
    """The rules' ids and versions."""
    folded: frozenset[tuple[str, str]]
    """The ids and versions of the rules that the fold alone decides."""
    definitions: bytes
    """The rules as in a rule file, a JSON array: serialized once, because every checkpoint contains
    it."""

    @property
    def counters(self) -> int:
        """How many checks and other numbers are counted."""
        return len(self.watched) - 1


def compile_rules(rules: Sequence[Rule], version: str = "") -> CompiledRules:
    """Compile the enabled rules; ``version`` identifies the set in reports."""
    enabled = tuple(rule for rule in rules if rule.enabled)
    checks: dict[SpanSet, int] = {}
    checks_of_rule = []
    candidates: dict[int, Bound] = {}
    for number, rule in enumerate(enabled):
        sets: dict[SpanSet, None] = {}
        clauses: tuple[Node | None, ...] = (
            rule.syntax.when,
            rule.syntax.always,
            rule.syntax.never,
        )
        if rule.syntax.relational:
            candidates[number] = bound = candidate(rule.syntax)
            clauses = () if isinstance(bound, bool) else (bound,)
        for clause in clauses:
            sets.update(dict.fromkeys(span_sets(clause)))
        checks_of_rule.append(tuple(checks.setdefault(s, len(checks)) for s in sets))

    predicates = ProgramBuilder()
    starts: dict[Node, int] = {}
    predicate_of = np.full(len(checks), -1, np.int64)
    for spans, check in checks.items():
        if spans.where is not None:
            if spans.where not in starts:
                starts[spans.where] = predicates.add(spans.where)
            predicate_of[check] = starts[spans.where]
    code, leaves, text = predicates.arrays()

    emitter = _RuleEmitter(checks)
    rule_rows = np.zeros((len(enabled), RULE_COLUMNS), np.int64)
    for number, (row, rule) in enumerate(zip(rule_rows, enabled, strict=True)):
        if number in candidates:
            emitter.emit_candidate(row, candidates[number])
        else:
            emitter.emit_rule(row, rule.syntax.when, rule.syntax.always, rule.syntax.never)

    skipping = {k for k, rule in enumerate(enabled) if rule.incomplete == SKIP}
    rule_rows[list(skipping), R_EARLY] = 0  # an open trace is always incomplete

    searching = [check for spans, check in checks.items() if has_pattern(spans.where)]
    counters = len(checks) + len(searching)
    unknown_of = np.full(len(checks) + 1, -1, np.int64)
    unknown_of[searching] = np.arange(len(checks), counters)

    thresholds: list[set[int]] = [set() for _ in range(counters)]
    for row, rule in zip(rule_rows, enabled, strict=True):
        if row[R_EARLY]:
            for clause in (rule.syntax.when, rule.syntax.always, rule.syntax.never):
                _collect_thresholds(clause, checks, thresholds)
    rules_of: list[list[int]] = [[] for _ in checks]
    for r, used in enumerate(checks_of_rule):
        for check in used:
            rules_of[check].append(r)
    rules_of += [rules_of[check] for check in searching]
    early_rules: dict[int, RuleSyntax] = {}
    watched = np.zeros(counters + 1, np.int64)
    for number, bound in candidates.items():
        before = early(enabled[number].syntax) if number not in skipping else None
        if before is not None and checks_of_rule[number] and not isinstance(bound, bool):
            early_rules[number] = before
            _collect_thresholds(bound, checks, thresholds)
            watched[list(checks_of_rule[number])] = 1
    may_be_early = [
        (row[R_EARLY] and not row[R_EARLY_ON_EMPTY]) or number in early_rules
        for number, row in enumerate(rule_rows)
    ]
    early_of = [[r for r in of if may_be_early[r]] for of in rules_of[: len(checks)]]
    early_of += [[] for _ in searching]

    return CompiledRules(
        rules=enabled,
        version=version,
        checks=tuple(checks),
        check_names=tuple(format_check(spans) for spans in checks),
        names=NameTable([(spans.name, check) for spans, check in checks.items()], hash_text),
        predicates=predicate_of,
        code=code,
        leaves=leaves,
        text=text,
        rule_rows=rule_rows,
        programs=np.array(emitter.rows, np.int64).reshape(-1, 4),
        rules_of=_end_to_end(rules_of),
        early_of=_end_to_end(early_of),
        thresholds=_end_to_end([sorted(found) for found in thresholds]),
        on_empty=np.flatnonzero(rule_rows[:, R_ON_EMPTY]).astype(np.int64),
        checks_of_rule=tuple(checks_of_rule),
        relational=frozenset(candidates),
        read_back=frozenset(candidates.keys() | skipping),
        early_rules=early_rules,
        unknown_of=unknown_of,
        watched=watched,
        least=tuple(_least(rule) for rule in enabled),
        patterns=PatternSearch(spans.where for spans in checks),
        identities=frozenset((rule.id, rule.version) for rule in enabled),
        folded=frozenset(
            (rule.id, rule.version)
            for rule in enabled
            if not rule.syntax.relational and rule.incomplete != SKIP
        ),
        definitions=orjson.dumps([rule.definition(examples=False) for rule in enabled]),
    )


def compile_definitions(definitions: bytes, version: str) -> CompiledRules:
    """Compile rules again from :attr:`CompiledRules.definitions`. Raises
    :exc:`~betrace.service.rules.definition.RuleFileError` if one is no longer a valid rule."""
    return compile_rules([make_rule(each) for each in orjson.loads(definitions)], version)


def _least(rule: Rule) -> Alternatives:
    return least(rule.syntax) if rule.syntax.relational else (Least(),)


def _end_to_end(lists: Sequence[Sequence[int]]) -> tuple[Rows, Rows]:
    """``(values, starts)``: the concatenated lists, where each begins, and where the last ends."""
    starts = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(items) for items in lists], out=starts[1:])
    return np.array([item for items in lists for item in items], np.int64), starts


@dataclass(frozen=True, slots=True)
class _Range:
    """The values an expression can become certain of while a trace is open, and its value on an
    empty trace that is ``open`` (three-valued) or ``closed``."""

    can_be_true: bool
    can_be_false: bool
    open: int
    closed: bool


_CONSTANT = {
    True: _Range(True, False, TRUE, True),
    False: _Range(False, True, FALSE, False),
}


class _RuleEmitter:
    """Writes rule programs and determines how each may be decided."""

    def __init__(self, checks: dict[SpanSet, int]) -> None:
        self.rows: list[tuple[int, int, int, int]] = []
        self._checks = checks

    def emit_rule(
        self, row: np.ndarray, when: Node | None, always: Node | None, never: Node | None
    ) -> None:
        """Fill a rule row: ``when and (not always or never)``."""
        holds = self._program(row, R_WHEN, when, absent=True)
        required = self._program(row, R_ALWAYS, always, absent=True)
        banned = self._program(row, R_NEVER, never, absent=False)
        row[R_EARLY] = holds.can_be_true and (required.can_be_false or banned.can_be_true)
        row[R_ON_EMPTY] = holds.closed and (not required.closed or banned.closed)
        row[R_EARLY_ON_EMPTY] = holds.open == TRUE and (
            required.open == FALSE or banned.open == TRUE
        )

    def emit_candidate(self, row: np.ndarray, bound: Bound) -> None:
        """Fill the row of a relational rule, which is decided only when a trace is closed."""
        node = None if isinstance(bound, bool) else bound
        holds = self._program(row, R_WHEN, node, absent=bound is not False)
        self._program(row, R_ALWAYS, None, absent=True)
        self._program(row, R_NEVER, None, absent=True)
        row[R_ON_EMPTY] = holds.closed

    def _program(self, row: np.ndarray, column: int, node: Node | None, absent: bool) -> _Range:
        row[column] = len(self.rows)
        if node is None:
            self.rows.append((CONSTANT, TRUE if absent else FALSE, 0, 0))
            found = _CONSTANT[absent]
        else:
            found = self._emit(node)
        self.rows.append((END, 0, 0, 0))
        return found

    def _emit(self, node: Node) -> _Range:
        match node:
            case Exists(spans):
                self.rows.append((EXISTS, self._checks[spans], 0, 0))
                return _Range(True, False, UNKNOWN, False)
            case Before(first, second):
                self.rows.append((BEFORE, self._checks[first], self._checks[second], 0))
                return _Range(False, False, UNKNOWN, False)
            case CountCompare():
                return self._emit_count(node)
            case Not(item):
                inner = self._emit(item)
                self.rows.append((NOT, 0, 0, 0))
                return _Range(
                    inner.can_be_false, inner.can_be_true, TRUE - inner.open, not inner.closed
                )
            case And(items):
                parts = self._emit_all(items, AND)
                return _Range(
                    all(p.can_be_true for p in parts),
                    any(p.can_be_false for p in parts),
                    min(p.open for p in parts),
                    all(p.closed for p in parts),
                )
            case Or(items):
                parts = self._emit_all(items, OR)
                return _Range(
                    any(p.can_be_true for p in parts),
                    all(p.can_be_false for p in parts),
                    max(p.open for p in parts),
                    any(p.closed for p in parts),
                )
            case _:
                raise TypeError(f"not a condition: {node!r}")

    def _emit_all(self, items: tuple[Node, ...], op: int) -> list[_Range]:
        parts = []
        for i, item in enumerate(items):
            parts.append(self._emit(item))
            if i:
                self.rows.append((op, 0, 0, 0))
        return parts

    def _emit_count(self, node: CountCompare) -> _Range:
        normal = _normalise(node)
        if isinstance(normal, bool):
            self.rows.append((CONSTANT, TRUE if normal else FALSE, 0, 0))
            return _CONSTANT[normal]
        spans, op, other = normal
        if isinstance(other, SpanSet):
            self.rows.append((COUNT_COUNT, self._checks[spans], op, self._checks[other]))
            return _Range(False, False, UNKNOWN, op in (EQ, LE, GE))
        self.rows.append((COUNT_NUMBER, self._checks[spans], op, other))
        zero = {EQ: other == 0, NE: other != 0, LT: other > 0, GT: False}[op]
        return _Range(op in (GT, NE), op in (LT, EQ), UNKNOWN, zero)


def _normalise(node: CountCompare) -> bool | tuple[SpanSet, int, SpanSet | int]:
    """The comparison with the count on the left and ``== != < >`` with a natural number on the
    right, or its constant value.

    For a natural number, ``<=`` becomes ``<`` of the next number and ``>=`` becomes ``>`` of the
    previous one, so that four operators with known thresholds remain.
    """
    left, right, op = node.left, node.right, _OPS[node.op]
    if isinstance(left, SpanSet) and isinstance(right, SpanSet):
        return left, op, right
    if isinstance(right, SpanSet):
        left, right, op = right, left, _MIRRORED[op]
    assert isinstance(left, SpanSet)
    assert not isinstance(right, SpanSet)
    return _natural(left, op, right)


def _natural(spans: SpanSet, op: int, number: Number) -> bool | tuple[SpanSet, int, int]:
    limit = 2**62  # no count reaches it
    if op in (EQ, NE):
        if number != math.floor(number) or number < 0:
            return op == NE
        return spans, op, min(int(number), limit)
    if op in (LT, LE):
        bound = math.ceil(number) if op == LT else math.floor(number) + 1  # count < bound
        return False if bound <= 0 else (spans, LT, min(bound, limit))
    above = math.floor(number) if op == GT else math.ceil(number) - 1  # count > above
    return True if above < 0 else (spans, GT, min(above, limit))


def _collect_thresholds(
    node: Node | None, checks: dict[SpanSet, int], thresholds: list[set[int]]
) -> None:
    match node:
        case Exists(spans):
            thresholds[checks[spans]].add(1)
        case CountCompare():
            normal = _normalise(node)
            if not isinstance(normal, bool) and isinstance(normal[2], int):
                spans, op, number = normal
                assert isinstance(number, int)
                # count < n becomes false at n; the others change at n + 1
                thresholds[checks[spans]].add(number if op == LT else number + 1)
        case And(items) | Or(items):
            for item in items:
                _collect_thresholds(item, checks, thresholds)
        case Not(item):
            _collect_thresholds(item, checks, thresholds)
        case _:
            pass
