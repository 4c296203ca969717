"""Finds the spans of a set: by name, by relatives in the group, or by a value that equals the
group's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from betrace.service.rules import exact
from betrace.service.rules.exact import UnknownError, Value
from betrace.service.rules.syntax import (
    And,
    Arithmetic,
    Comparison,
    Constant,
    Expression,
    Node,
    Ref,
    Relative,
    SpanSet,
)
from betrace.service.rules.trace_tree import TraceSpan
from betrace.service.rules.workspace import Workspace


class Selection:
    """The span sets of one rule on one trace. ``satisfies`` and ``value`` evaluate a predicate and
    an expression for a span (None for an expression of the group)."""

    def __init__(
        self,
        run: Workspace,
        satisfies: Callable[[Node, TraceSpan], bool],
        value: Callable[[Expression, TraceSpan | None], Value],
    ) -> None:
        self._run = run
        self._satisfies = satisfies
        self._value = value

    def select(self, spans: SpanSet) -> list[TraceSpan]:
        """The spans of a set, in order of start and id."""
        if spans.where is None:
            return self._base(spans)
        memo = self._run.own if self._run.is_dependent(spans) else self._run.memo
        found = memo.get(("select", id(spans)))
        if found is None:
            candidates, where = self._candidates(spans)
            found = [s for s in candidates if where is None or self._satisfies(where, s)]
            memo["select", id(spans)] = found
        return found  # type: ignore[no-any-return]

    def exists(self, spans: SpanSet) -> bool:
        """Whether a set has a span; unknown only if none certainly is in it."""
        try:
            return bool(self.select(spans))
        except UnknownError:
            for span in self._base(spans):
                try:
                    if spans.where is None or self._satisfies(spans.where, span):
                        return True
                except UnknownError:
                    pass
            raise

    def _base(self, spans: SpanSet) -> list[TraceSpan]:
        if spans.bound:
            return self._run.group.spans if self._run.group is not None else []
        return self._run.trace.named(spans.name)

    def _candidates(self, spans: SpanSet) -> tuple[list[TraceSpan], Node | None]:
        """The spans that may be in a set, and what they must satisfy."""
        where = spans.where
        if spans.bound or not self._run.is_dependent(where):
            return self._base(spans), where
        for part in where.items if isinstance(where, And) else (where,):
            if isinstance(part, Relative) and part.spans.bound and "_by" not in part.kind:
                return self._near(spans, part), where
        join = self._join(spans)
        if join is None:
            return self._base(spans), where
        of_group, index = join
        value = self._value(of_group, None)
        wanted: list[tuple[str, Any]] = []
        number = exact.number(value)
        if number is not None:
            wanted.append(("number", number))
        if isinstance(value, str | bool):
            wanted.append(("text", exact.text(value)))
        found: dict[str, TraceSpan] = {}
        for each in wanted:
            for span in index.get(each, ()):
                found[span.id] = span
        if len(wanted) > 1:
            return sorted(found.values(), key=lambda span: (span.start, span.id)), where
        return list(found.values()), where

    def _near(self, spans: SpanSet, part: Relative) -> list[TraceSpan]:
        """The spans with the set's name that have a relative in the group."""
        trace = self._run.trace
        key = ("named", id(spans))
        if key not in self._run.memo:
            self._run.memo[key] = frozenset(span.id for span in self._base(spans))
        named: frozenset[str] = self._run.memo[key]
        found: dict[str, TraceSpan] = {}
        for span in self.select(part.spans):
            near: Iterable[TraceSpan | None]
            match part.kind:
                case "parent":
                    near = trace.children(span.id)
                case "child":
                    near = (trace.parent(span),)
                case "sibling":
                    near = trace.children(span.parent_id)
                case "ancestor":
                    near = trace.below(span)
                case _:
                    near = trace.ancestors(span)
            for each in near:
                self._run.step()
                if each is not None and each.id in named:
                    found[each.id] = each
        return sorted(found.values(), key=lambda span: (span.start, span.id))

    def _join(
        self, spans: SpanSet
    ) -> tuple[Expression, Mapping[tuple[str, Any], list[TraceSpan]]] | None:
        """The side of an equality that is of the group, and the spans by the other side's value;
        None if the predicate has no such equality."""
        key = ("join", id(spans))
        if key not in self._run.memo:
            self._run.memo[key] = self._find_join(spans)
        return self._run.memo[key]  # type: ignore[no-any-return]

    def _find_join(
        self, spans: SpanSet
    ) -> tuple[Expression, Mapping[tuple[str, Any], list[TraceSpan]]] | None:
        where = spans.where
        parts = where.items if isinstance(where, And) else (where,)
        for part in parts:
            if not isinstance(part, Comparison) or part.op != "==":
                continue
            for one, other in ((part.left, part.right[0]), (part.right[0], part.left)):
                if self._is_of_group(one) and not self._run.is_dependent(other):
                    index: dict[tuple[str, Any], list[TraceSpan]] = {}
                    for span in self._base(spans):
                        self._run.step()
                        value = self._value(other, span)
                        number = exact.number(value)
                        if number is not None:
                            index.setdefault(("number", number), []).append(span)
                        if isinstance(value, str | bool):
                            index.setdefault(("text", exact.text(value)), []).append(span)
                    return one, index
        return None

    def _is_of_group(self, node: Expression) -> bool:
        """Whether a value depends on the group, and not on the span."""
        return self._run.is_dependent(node) and self._without_span(node)

    def _without_span(self, node: Expression) -> bool:
        match node:
            case Constant():
                return True
            case Ref(scope):
                return scope in ("root", "trace", self._run.word)
            case Arithmetic(first, rest):
                return all(map(self._without_span, (first, *(right for _, right in rest))))
            case _:
                return False
