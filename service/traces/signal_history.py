"""What was said of a trace: how far the signals of each rule have come.

A breach may be raised, retracted when late spans undo it, and be true again. The signals of one
rule and trace so alternate, and their number tells all: it is odd while one stands, and half of it
is the number of the next (:func:`betrace.service.signals.signal_id`). It is kept with a trace that
was
reopened, read from the query store for one that was forgotten, and learnt from the ledger after a
restart, in every case as a count of signals that have ids: counting one twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from betrace.service.signals import Kind, Signal

Rule = tuple[str, str]
"""A rule's id and its version."""


class Raised(NamedTuple):
    """The signals of one rule and trace."""

    steps: int
    """How many there were: raised, retracted, raised again, and so on."""
    clause: str
    """The clause (always | never) that the last one raised was for."""

    @property
    def stands(self) -> bool:
        """Whether the last was not a retraction."""
        return self.steps % 2 == 1


Told = Mapping[Rule, Raised]
"""By rule; a rule without any signal is left out."""


def merged(one: Told, other: Told) -> Told:
    """Two reports of the same trace as one: of each rule, what is further."""
    found = dict(one)
    for rule, raised in other.items():
        if rule not in found or raised.steps > found[rule].steps:
            found[rule] = raised
    return found


def next_steps(told: Told, broken: Mapping[Rule, str], known: Collection[Rule]) -> Told:
    """The rules whose signals go a step further with a verdict, as they are then.

    ``broken`` are the rules that the whole trace breaks, with the clause; ``known`` all that it was
    judged by. A rule of which another version was found broken is not raised a second time, and a
    verdict of rules that are gone stays: what they would say now is not known.
    """
    elsewhere = standing_elsewhere(told, known)
    steps: dict[Rule, Raised] = {}
    for rule, clause in broken.items():
        before = told.get(rule)
        if (before is None or not before.stands) and rule[0] not in elsewhere:
            steps[rule] = Raised((before.steps if before else 0) + 1, clause)
    for rule, before in told.items():
        if before.stands and rule in known and rule not in broken:
            steps[rule] = Raised(before.steps + 1, before.clause)
    return steps


def standing_elsewhere(told: Told, known: Collection[Rule]) -> set[str]:
    """Ids of rules that stand as broken in a version that is not ``known``."""
    return {rule[0] for rule, raised in told.items() if raised.stands and rule not in known}


def told_of(raised: int, retracted: int, clause: str) -> Raised:
    """From how many signals of each kind there are; some may be missing."""
    return Raised(max(2 * raised - 1, 2 * retracted), clause)


class RaisedBefore:
    """By tenant and trace id, what the ledger has that the traces of the last checkpoint do not
    know. Tables take from it what concerns them. Not thread-safe: one thread at a time."""

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, Told]] = {}

    def __len__(self) -> int:
        return sum(len(traces) for traces in self._tenants.values())

    def of(self, tenant: str) -> dict[str, Told]:
        """By trace id; always the same object, from which entries may be taken."""
        return self._tenants.setdefault(tenant, {})

    def note(self, signals: Iterable[Signal]) -> None:
        """Take stored signals into account, in any order. What was raised early is left out: no
        later span can undo it, and it is found again under the same id."""
        for signal in signals:
            if signal.kind is Kind.RAISED and signal.early:
                continue
            steps = 2 * signal.episode + (1 if signal.kind is Kind.RAISED else 2)
            traces = self.of(signal.tenant)
            rule = (signal.rule_id, signal.rule_version)
            traces[signal.trace_id] = merged(
                traces.get(signal.trace_id, {}), {rule: Raised(steps, signal.clause)}
            )

    def keep(self, wanted: Callable[[str, str], bool]) -> None:
        """Forget all but ``wanted(tenant, trace id)``."""
        for tenant, traces in self._tenants.items():
            for trace_id in [each for each in traces if not wanted(tenant, each)]:
                del traces[trace_id]

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        self._tenants.pop(tenant, None)

    def saved(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            tenant: {trace_id: listed(told) for trace_id, told in traces.items()}
            for tenant, traces in self._tenants.items()
            if traces
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take in what :meth:`saved` gave."""
        for tenant, traces in saved.items():
            self.of(tenant).update({each: unlisted(told) for each, told in traces.items()})


def listed(told: Told) -> list[list[Any]]:
    """As JSON."""
    return [[*rule, *raised] for rule, raised in sorted(told.items())]


def unlisted(rows: Iterable[Iterable[Any]]) -> Told:
    """What :func:`listed` was given."""
    return {(rule_id, version): Raised(steps, clause) for rule_id, version, steps, clause in rows}
