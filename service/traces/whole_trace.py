"""A whole trace that was read to judge rules that relate its spans."""

from __future__ import annotations

from functools import cached_property

from betrace.service.rules.columns import TraceColumns
from betrace.service.rules.trace_tree import TraceTree


class WholeTrace:
    """Trace ``number`` of some that were read together."""

    def __init__(self, columns: TraceColumns, number: int) -> None:
        self.columns = columns
        self.number = number

    @cached_property
    def tree(self) -> TraceTree:
        """The trace as objects, which are made when they are first needed."""
        return self.columns.tree(self.number)

    @property
    def missing_parents(self) -> int:
        """The number of distinct parent ids of which the trace has no span."""
        return self.tree.missing_parents
