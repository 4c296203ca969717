"""How a rule is decided, and what that costs: chosen when it is compiled."""

from __future__ import annotations

from functools import lru_cache

from betrace.service.rules.candidates import candidate
from betrace.service.rules.column_rules import ColumnRule
from betrace.service.rules.column_values import UnsupportedError
from betrace.service.rules.early import early
from betrace.service.rules.format import format_condition
from betrace.service.rules.least import Least, least
from betrace.service.rules.syntax import RuleSyntax

FOLD, SKELETON, BY_KEY, READ_BACK = "fold", "skeleton", "values by key", "read back"

# Measured by perf.relations, reading included. A trace that breaks the rule is judged span by span
# as well.
_JUDGED = {
    SKELETON: "judges its skeleton: names, ids, parents and times (about 5 µs a span)",
    BY_KEY: "judges its values by key (about 5 µs a span)",
    READ_BACK: "judges it span by span (about 10 µs a span)",
}


@lru_cache(maxsize=4096)
def decided_by(rule: RuleSyntax) -> str:
    """``fold``: by counts, while the spans arrive. Other rules are judged on the whole traces that
    the fold cannot decide, which are read back: ``skeleton`` and ``values by key`` on many at once,
    from their names, ids, parents and times, or with other values as well; ``read back`` on one at
    a time."""
    if not rule.relational:
        return FOLD
    try:
        return BY_KEY if ColumnRule(rule).reads_values else SKELETON
    except UnsupportedError:
        return READ_BACK


def _size(needed: Least) -> str:
    """What a trace must have; empty for nothing worth saying."""
    parts = [f"at least {needed.spans} spans"] if needed.spans > 2 else []
    parts += [f"a duration of at least {needed.duration} ns"] if needed.duration else []
    return " and ".join(parts)


def plan(rule: RuleSyntax) -> str:
    """The same in a sentence for people."""
    if not rule.relational:
        return "decided from counts while the spans arrive"
    when = "when it closes" if early(rule) is None else "while it is open and when it closes"
    bound = candidate(rule)
    if bound is False:
        return "never broken"
    needs = [format_condition(bound)] if not isinstance(bound, bool) else []
    sizes = [_size(each) for each in least(rule)]
    needs += [" or ".join(sizes)] if all(sizes) else []
    judged = _JUDGED[decided_by(rule)]
    if not needs:
        return f"reads every trace back from the span log {when} and {judged}"
    return (
        f"reads a trace back from the span log {when} and {judged}, if it has: {', '.join(needs)}"
    )
