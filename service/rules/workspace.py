"""The trace and group that a rule is evaluated on, and what was found out about them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from betrace.service.rules.dependence import Dependence
from betrace.service.rules.exact import Value
from betrace.service.rules.syntax import Ref
from betrace.service.rules.trace_tree import TraceSpan, TraceTree

STEPS = 200_000  # of a rule on a trace, and as many for each of its spans:
STEPS_OF_SPAN = 20  # a step takes 2 to 5 microseconds
STEPS_AT_ONCE = 1000  # between looks at the clock

FOREVER = float("inf")


class TooMuchWorkError(Exception):
    """A rule needs more steps or time than allowed."""


@dataclass(frozen=True, slots=True)
class Group:
    """The spans that the bound word stands for, and the values after ``by``."""

    spans: list[TraceSpan]
    values: Mapping[Ref, Value] = field(default_factory=dict)


class Workspace:
    """One rule and one trace; ``word`` is the bound word of the rule. Nodes are known by identity:
    they live as long as the rule. ``depends`` says which of them depend on the group; it is filled
    here, and may be kept for other traces."""

    def __init__(
        self,
        trace: TraceTree,
        word: str | None,
        until: float,
        depends: dict[int, bool],
    ) -> None:
        self.trace = trace
        self.word = word
        self.group: Group | None = None
        self.memo: dict[tuple[str, int], Any] = {}
        """The same for all groups."""
        self.own: dict[tuple[str, int], Any] = {}
        """Of the present group."""
        self._left = STEPS + STEPS_OF_SPAN * len(trace.spans)
        self._look_at = self._left
        self._until = until
        self.is_dependent = Dependence(word, depends).has
        """Whether a node depends on the group."""

    def enter(self, group: Group) -> None:
        """Let the bound word stand for a group from now on."""
        self.group = group
        self.own = {}

    def step(self, steps: int = 1) -> None:
        """Count steps. Raises :exc:`TooMuchWorkError`."""
        self._left -= steps
        if self._left < self._look_at:
            if self._left < 0:
                raise TooMuchWorkError("the rule needs too much work for this trace")
            if time.monotonic() > self._until:
                raise TooMuchWorkError("there was too little time for this trace")
            self._look_at = self._left - STEPS_AT_ONCE
