"""Values and comparisons in columns: of the spans of many traces, or of traces and groups.

Comparisons with literals run in the fold's kernel; other values are compared one by one, with
:mod:`betrace.service.rules.exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.rules import exact
from betrace.service.rules.candidates import is_folded, literal
from betrace.service.rules.column_kernels import Flags, satisfying
from betrace.service.rules.columns import TraceColumns
from betrace.service.rules.exact import UnknownError, Value
from betrace.service.rules.match import ASK, YES, SpanValues, evaluate
from betrace.service.rules.program import ProgramBuilder
from betrace.service.rules.syntax import (
    Aggregate,
    Arithmetic,
    Compare,
    Comparison,
    Constant,
    Counted,
    Expression,
    Given,
    Part,
    Ref,
    Relative,
    Truthy,
)
from betrace.service.rules.trace_tree import SERVICE

_SPAN_SCOPES = ("", "parent", "root")


class UnsupportedError(Exception):
    """A rule has a construct that is not judged in columns."""


class Programs:
    """The comparisons with literals of one rule, for the kernel. Nodes are known by identity."""

    def __init__(self) -> None:
        self._builder = ProgramBuilder()
        self._known: dict[int, tuple[int, Compare | Truthy] | None] = {}
        self.reads_values = False
        """Whether other values of spans are read."""
        self.finish()

    def of(
        self, node: Comparison | Given, predicate: Callable[[], Compare | Truthy | None]
    ) -> tuple[int, Compare | Truthy] | None:
        """The program of the predicate that is equivalent to a node, and the predicate; None if
        there is no such predicate."""
        if id(node) not in self._known:
            found = predicate()
            self._known[id(node)] = (self._builder.add(found), found) if found else None
        return self._known[id(node)]

    def finish(self) -> None:
        """Make the arrays for the kernel."""
        self.code, self.leaves, self.text = self._builder.arrays()


@dataclass(slots=True)
class Items:
    """What conditions are evaluated for: traces, or the groups of ``for each``."""

    at: Rows
    """The number of each item's trace."""

    word: str | None = None
    """The bound word; None for traces."""

    by: bool = False
    """Whether groups are formed by values."""

    first: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    """The first span of each group."""

    group: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    """The number of each span's group, -1 without one."""

    values: dict[Ref, list[Value]] = field(default_factory=dict)
    """The values after ``by`` of each group."""


class ColumnComparisons:
    """Evaluates values and comparisons of one rule on some traces. ``spans`` are spans of the
    traces, None stands for the items; ``counted`` and ``aggregate`` evaluate those nodes. Traces
    whose result is not known are marked in ``unsure``. Methods raise :exc:`UnsupportedError`."""

    def __init__(
        self,
        programs: Programs,
        traces: TraceColumns,
        items: Items,
        unsure: Flags,
        counted: Callable[[Relative | Part, Rows], Rows],
        aggregate: Callable[[Aggregate], list[Value]],
    ) -> None:
        self._programs = programs
        self._traces = traces
        self._of = traces.spans.of
        self._items = items
        self._unsure = unsure
        self._counted = counted
        self._aggregate = aggregate

    def hold(self, node: Comparison | Given, spans: Rows | None) -> Flags:
        """Whether a comparison holds."""
        ref = node.ref if isinstance(node, Given) else node.left
        found = self._programs.of(node, lambda: self._with_literals(node, ref))
        if found is not None:
            assert isinstance(ref, Ref)
            return self._satisfy(*found, self._targets(ref, spans))
        if isinstance(node, Given):
            values = self.values(node.ref, spans)
            return np.array(
                [exact.truthy(each) if node.truthy else each is not None for each in values], bool
            )
        left = self.values(node.left, spans)
        right = [self.values(each, spans) for each in node.right]
        at = self._items.at if spans is None else self._of[spans]
        return np.array(
            [
                self._compare(value, node.op, others, trace)
                for trace, value, *others in zip(at.tolist(), left, *right, strict=True)
            ],
            bool,
        )

    def _compare(self, left: Value, op: str, right: Sequence[Value], trace: int) -> bool:
        if op == "in":
            return any(exact.compare(left, "==", each) for each in right)
        try:
            return exact.holds(left, op, right[0])
        except UnknownError:
            self._unsure[trace] = True
            return False

    def _with_literals(self, node: Comparison | Given, ref: Expression) -> Compare | Truthy | None:
        """The equivalent predicate, for the kernel, of the span that ``ref`` refers to."""
        if not isinstance(ref, Ref) or not is_folded(ref.attribute) or not self._is_span(ref):
            return None
        if isinstance(node, Given):
            return Truthy(ref.attribute) if node.truthy else None
        literals = [literal(each) for each in node.right]
        given = tuple(each for each in literals if each is not None)
        return Compare(ref.attribute, node.op, given) if len(given) == len(literals) else None

    def _is_span(self, ref: Ref) -> bool:
        """Whether a ref refers to one span."""
        bound = ref.scope == self._items.word and not self._items.by
        return ref.scope in _SPAN_SCOPES or bound

    def _targets(self, ref: Ref, spans: Rows | None) -> Rows:
        """The spans that a ref refers to; -1 for none."""
        match ref.scope:
            case "" if spans is not None:
                return spans
            case "parent" if spans is not None:
                return self._traces.spans.parent[spans]
            case "root":
                return self._traces.roots[self._items.at if spans is None else self._of[spans]]
            case self._items.word if not self._items.by:
                first = self._items.first
                return first if spans is None else first[self._items.group[spans]]
            case _:
                raise UnsupportedError

    def _satisfy(self, program: int, node: Compare | Truthy, spans: Rows) -> Flags:
        """Whether spans satisfy a predicate with literals; for number -1, whether a missing value
        does."""
        batch, programs = self._traces.batch, self._programs
        found = np.full(len(spans), isinstance(node, Compare) and node.op == "!=")
        present = np.flatnonzero(spans >= 0)
        if not len(present):
            return found
        rows = self._traces.spans.row[spans[present]]
        verdicts = np.empty(len(rows), np.int64)
        satisfying(
            program,
            programs.code,
            programs.leaves,
            programs.text,
            batch.buf,
            batch.spans,
            batch.resources,
            batch.scopes,
            rows,
            np.zeros(4, np.int64),
            verdicts,
        )
        found[present] = verdicts == YES
        values = SpanValues(batch)
        for k in np.flatnonzero(verdicts == ASK).tolist():
            verdict = evaluate(node, values, int(rows[k]))
            found[present[k]] = bool(verdict)
            if verdict is None:
                self._unsure[self._of[spans[present[k]]]] = True
        return found

    def values(self, node: Expression, spans: Rows | None) -> list[Value]:
        """The values of an expression."""
        at = self._items.at if spans is None else self._of[spans]
        match node:
            case Constant(value):
                return [value] * len(at)
            case Ref("trace", attribute):
                return self._of_traces(attribute.name, at)
            case Ref(self._items.word, attribute) if self._items.by:
                known = self._items.values.get(Ref("", attribute))
                groups = range(len(at)) if spans is None else self._items.group[spans].tolist()
                return [known[group] if known is not None else None for group in groups]
            case Ref(_, attribute):
                self._programs.reads_values = True
                return self._traces.values(attribute, self._targets(node, spans))
            case Arithmetic(first, rest):
                result = self.values(first, spans)
                for op, right in rest:
                    pairs = zip(result, self.values(right, spans), strict=True)
                    result = [exact.calculate(one, op, other) for one, other in pairs]
                return result
            case Counted(what) if spans is not None:
                return self._counted(what, spans).tolist()  # type: ignore[no-any-return]
            case Aggregate() if spans is None:
                return self._aggregate(node)
            case _:
                raise UnsupportedError

    def _of_traces(self, name: str, at: Rows) -> list[Value]:
        match name:
            case "duration":
                found = self._traces.duration
            case "spans":
                found = np.bincount(self._of, minlength=self._traces.traces)
            case _:
                services = self._traces.values(SERVICE, np.arange(len(self._of)))
                pairs = set(zip(self._of.tolist(), services, strict=True))
                of = [trace for trace, service in pairs if service is not None]
                found = np.bincount(np.array(of, np.int64), minlength=self._traces.traces)
        return found[at].tolist()  # type: ignore[no-any-return]
