"""Finds the relatives of spans along the tree and in time, for all spans of a trace at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

from betrace.service.rules.syntax import Relative, SpanSet
from betrace.service.rules.trace_tree import TraceSpan, follows
from betrace.service.rules.workspace import FOREVER, Workspace


class Relatives:
    """The relatives in one trace; ``select`` finds the spans of a set."""

    def __init__(self, run: Workspace, select: Callable[[SpanSet], list[TraceSpan]]) -> None:
        self._run = run
        self._select = select

    def count(self, node: Relative, span: TraceSpan) -> int:
        """The number of relatives in the set; of ancestors, parents and spans in time 0 or 1."""
        if self._run.is_dependent(node.spans):
            return self._relatives_of_group(node, span)
        trace = self._run.trace
        match node.kind:
            case "parent":
                parent = trace.parent(span)
                return parent is not None and parent.id in self._ids(node.spans)
            case "child":
                own = span.parent_id == span.id and span.id in self._ids(node.spans)
                return self._by_parent(node.spans).get(span.id, 0) - own
            case "sibling":
                own = span.id in self._ids(node.spans)
                if not span.parent_id:
                    return 0
                return self._by_parent(node.spans).get(span.parent_id, 0) - own
            case "ancestor":
                found = self._memoised("below", node.spans, trace.with_ancestor)
                return span.id in found
            case "descendant":
                counts = self._memoised("above", node.spans, trace.descendants)
                return counts.get(span.id, 0)  # type: ignore[no-any-return]
            case _:
                return self._in_time(node, span, self._starts(node.spans, self._run.memo))

    def _memoised(self, name: str, spans: SpanSet, compute: Callable[[frozenset[str]], Any]) -> Any:
        key = (name, id(spans))
        if key not in self._run.memo:
            self._run.step(len(self._run.trace.spans))
            self._run.memo[key] = compute(self._ids(spans))
        return self._run.memo[key]

    def _ids(self, spans: SpanSet) -> frozenset[str]:
        memo = self._run.own if self._run.is_dependent(spans) else self._run.memo
        key = ("ids", id(spans))
        if key not in memo:
            memo[key] = frozenset(span.id for span in self._select(spans))
        return memo[key]  # type: ignore[no-any-return]

    def _by_parent(self, spans: SpanSet) -> Mapping[str, int]:
        key = ("by parent", id(spans))
        if key not in self._run.memo:
            counts: dict[str, int] = {}
            for span in self._select(spans):
                if span.parent_id:
                    counts[span.parent_id] = counts.get(span.parent_id, 0) + 1
            self._run.memo[key] = counts
        return self._run.memo[key]  # type: ignore[no-any-return]

    def _starts(self, spans: SpanSet, memo: dict[tuple[str, int], Any]) -> list[int]:
        key = ("starts", id(spans))
        if key not in memo:
            memo[key] = [span.start for span in self._select(spans)]
        return memo[key]  # type: ignore[no-any-return]

    def _in_time(self, node: Relative, span: TraceSpan, starts: list[int]) -> int:
        within = FOREVER if node.within is None else node.within.value
        assert not isinstance(within, str)
        if node.kind == "followed_by":
            return follows(starts, span.start, within)
        at = bisect_left(starts, span.start) - 1
        return at >= 0 and span.start - starts[at] <= within

    def _relatives_of_group(self, node: Relative, span: TraceSpan) -> int:
        """The same for a set that depends on the group, and is usually small."""
        trace = self._run.trace
        spans = self._select(node.spans)
        ids = self._ids(node.spans)
        match node.kind:
            case "parent":
                parent = trace.parent(span)
                return parent is not None and parent.id in ids
            case "child":
                self._run.step(len(spans))
                return sum(s.parent_id == span.id and s is not span for s in spans)
            case "sibling":
                self._run.step(len(spans))
                same = span.parent_id
                return sum(s.parent_id == same and s is not span for s in spans) if same else 0
            case "ancestor":
                return any(self._stepped(each) in ids for each in trace.ancestors(span))
            case "descendant":
                return sum(
                    any(self._stepped(each) == span.id for each in trace.ancestors(s))
                    for s in spans
                )
            case _:
                return self._in_time(node, span, self._starts(node.spans, self._run.own))

    def _stepped(self, span: TraceSpan) -> str:
        self._run.step()
        return span.id
