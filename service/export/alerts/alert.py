"""The alert of a rule, from its first breach until receivers know that it is over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import orjson

from betrace.service.signals import Signal, raised_id

MOST_EXAMPLES = 5
MOST_IDS = 500
"""Signals of an alert whose retraction is awaited. An alert with more resolves after the quiet time
only."""
_ID_DIGITS = 16  # of a signal's id; enough to tell the signals of one alert apart


class State(StrEnum):
    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class AlertExample:
    """A trace that broke the rule, and its signal."""

    signal: str
    trace: str
    message: str


@dataclass(slots=True)
class Delivered:
    """What a destination accepted last: the state, and when it first accepted it (nanoseconds
    since 1970)."""

    state: State
    at_ns: int


@dataclass(slots=True)
class Alert:
    """An alert of one tenant and rule. Times are nanoseconds since 1970.

    ``started_ns`` and ``last_ns`` are when the first and the last breach were detected; ``seen_ns``
    is when the last one was read from the ledger. ``count`` and the latest ``examples`` leave out
    retracted signals; ``active`` has the ids of the others, unless there are ``more``.

    ``ended_ns`` is 0 while the rule breaks. A ``withdrawn`` alert ended because its signals were
    retracted or the rule was muted; receivers that do not have it yet need not get it.
    """

    tenant: str
    rule: str
    severity: str
    labels: dict[str, str]
    started_ns: int
    last_ns: int = 0
    seen_ns: int = 0
    count: int = 0
    examples: list[AlertExample] = field(default_factory=list)
    active: set[str] = field(default_factory=set)
    more: bool = False
    ended_ns: int = 0
    withdrawn: bool = False
    delivered: dict[str, Delivered] = field(default_factory=dict)
    changed_ns: int = 0
    """When it began or ended."""

    revision: int = field(default=0, compare=False)
    """Grows with every change of what is sent; begins again with the process."""

    @classmethod
    def begin(cls, signal: Signal, now: int) -> Alert:
        """The alert of a first breach, before :meth:`add`."""
        labels = dict(signal.labels)
        severity, at = signal.severity, signal.detected_at
        return cls(signal.tenant, signal.rule_id, severity, labels, at, changed_ns=now)

    def add(self, signal: Signal, now: int) -> None:
        """Count a raised signal."""
        self.count += 1
        self.last_ns = max(self.last_ns, signal.detected_at)
        self.seen_ns = now
        self.examples = [each for each in self.examples if each.trace != signal.trace_id]
        self.examples.append(AlertExample(signal.id, signal.trace_id, signal.message))
        del self.examples[:-MOST_EXAMPLES]
        if len(self.active) < MOST_IDS:
            self.active.add(signal.id[:_ID_DIGITS])
        else:
            self.more = True
        self.revision += 1

    def retract(self, signal: Signal, now: int) -> None:
        """Take back the signal that ``signal`` retracts, if it is one of this alert's."""
        raised = raised_id(signal)
        if raised[:_ID_DIGITS] not in self.active:
            return
        self.active.discard(raised[:_ID_DIGITS])
        self.count -= 1
        self.examples = [each for each in self.examples if each.signal != raised]
        self.revision += 1
        if not self.active and not self.more:
            self.end(now, now, withdrawn=True)

    def end(self, at_ns: int, now: int, *, withdrawn: bool = False) -> None:
        """Note that the rule has not been broken since ``at_ns``."""
        self.ended_ns, self.withdrawn, self.changed_ns = at_ns, withdrawn, now
        self.revision += 1

    def reopen(self, now: int) -> None:
        """Continue an alert that ended, because the rule breaks again."""
        self.ended_ns, self.withdrawn, self.changed_ns = 0, False, now

    def quiet_ns(self, resolve_after_ns: int) -> int:
        """When it ends without another signal."""
        return max(self.last_ns, self.seen_ns) + resolve_after_ns

    def end_for(self, destination: str, now: int, resolve_after_ns: int) -> int | None:
        """When the alert ends, or will end, for a destination; None if it need not get it.

        A destination that did not get it in time sees it fire for ``resolve_after_ns``: an outage
        of Alertmanager must not hide that a rule was broken.
        """
        had = self.delivered.get(destination)
        if not self.ended_ns:
            return max(self.quiet_ns(resolve_after_ns), now + 1)
        if self.withdrawn:
            return None if had is None else self.ended_ns
        if had is None:
            return now + resolve_after_ns
        if had.state is State.RESOLVED:
            return self.ended_ns
        return max(self.ended_ns, had.at_ns + resolve_after_ns)

    def settled(self, destinations: list[str]) -> bool:
        """Whether it ended and all destinations know."""
        if not self.ended_ns:
            return False
        for name in destinations:
            had = self.delivered.get(name)
            if had is None and not self.withdrawn:
                return False
            if had is not None and had.state is not State.RESOLVED:
                return False
        return True

    def copy(self) -> Alert:
        """A copy that stays as it is."""
        return replace(
            self,
            examples=list(self.examples),
            active=set(self.active),
            delivered=dict(self.delivered),
        )

    def dump(self) -> bytes:
        """The alert as JSON."""
        return orjson.dumps(self, default=list)

    @classmethod
    def load(cls, text: bytes) -> Alert:
        """The inverse of :meth:`dump`. Raises LookupError, TypeError or ValueError."""
        found: dict[str, Any] = orjson.loads(text)
        found["examples"] = [AlertExample(**each) for each in found["examples"]]
        found["active"] = set(found["active"])
        found["delivered"] = {
            name: Delivered(State(each["state"]), each["at_ns"])
            for name, each in found["delivered"].items()
        }
        return cls(**found)
