"""Which parts of a rule depend on the group that the bound word stands for."""

from __future__ import annotations

from typing import Any

from betrace.service.rules.syntax import (
    Aggregate,
    And,
    Arithmetic,
    Comparison,
    Counted,
    Given,
    Not,
    Or,
    Part,
    Ref,
    Relative,
    SpanSet,
)


class Dependence:
    """Tells for the nodes of one rule, whose bound word is ``word``. Nodes are known by identity:
    they live as long as the rule. ``known`` is filled here and may be kept with the rule."""

    def __init__(self, word: str | None, known: dict[int, bool]) -> None:
        self._word = word
        self._known = known

    def has(self, node: Any) -> bool:
        """Whether a node depends on the group."""
        found = self._known.get(id(node))
        if found is None:
            found = self._known[id(node)] = self._find(node)
        return found

    def _find(self, node: Any) -> bool:
        match node:
            case Ref(scope):
                return self._word is not None and scope == self._word
            case SpanSet(_, where, bound):
                return bound or (where is not None and self.has(where))
            case And(items) | Or(items):
                return any(map(self.has, items))
            case Not(item):
                return self.has(item)
            case Comparison(left, _, right):
                return any(map(self.has, (left, *right)))
            case Given(ref):
                return self.has(ref)
            case Relative(_, spans):
                return self.has(spans)
            case Part(_, where):
                return where is not None and self.has(where)
            case Counted(what):
                return self.has(what)
            case Arithmetic(first, rest):
                return any(map(self.has, (first, *(right for _, right in rest))))
            case Aggregate(_, spans, ref):
                return self.has(spans) or (ref is not None and self.has(ref))
            case _:
                return False
