"""The signals already emitted for a trace, by rule.

A breach can be raised, retracted when late spans undo it, and raised again. The signals of one
rule and trace therefore alternate, and their number describes them completely: it is odd while the
rule is active, and half of it is the episode of the next signal
(:func:`betrace.service.signals.signal_id`). The number is kept with a reopened trace, read from the
query store for a trace that is no longer in memory, and read from the ledger after a restart. It
always counts signals that have ids, so counting one twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from betrace.service.signals import Kind, Signal

RuleVersion = tuple[str, str]
"""A rule's id and its version."""


class RuleSignals(NamedTuple):
    """The signals of one rule and trace."""

    emitted: int
    """How many: raised, retracted, raised again, and so on."""
    clause: str
    """The clause (always | never) of the last one raised."""

    @property
    def active(self) -> bool:
        """Whether the last signal was raised and not retracted."""
        return self.emitted % 2 == 1


SignalHistory = Mapping[RuleVersion, RuleSignals]
"""By rule; rules without signals are absent."""


def merged(one: SignalHistory, other: SignalHistory) -> SignalHistory:
    """Two histories of the same trace as one: the further of each rule."""
    found = dict(one)
    for rule, signals in other.items():
        if rule not in found or signals.emitted > found[rule].emitted:
            found[rule] = signals
    return found


def next_signals(
    history: SignalHistory, broken: Mapping[RuleVersion, str], known: Collection[RuleVersion]
) -> SignalHistory:
    """The rules for which a verdict emits one more signal, with that signal counted.

    ``broken`` are the rules that the whole trace breaks, with the clause; ``known`` are all rules
    it was checked against. A rule that is active in another version is not raised again, and
    verdicts of rules that no longer exist stay, because what they would decide now is unknown.
    """
    elsewhere = active_elsewhere(history, known)
    found: dict[RuleVersion, RuleSignals] = {}
    for rule, clause in broken.items():
        before = history.get(rule)
        if (before is None or not before.active) and rule[0] not in elsewhere:
            found[rule] = RuleSignals((before.emitted if before else 0) + 1, clause)
    for rule, before in history.items():
        if before.active and rule in known and rule not in broken:
            found[rule] = RuleSignals(before.emitted + 1, before.clause)
    return found


def active_elsewhere(history: SignalHistory, known: Collection[RuleVersion]) -> set[str]:
    """Ids of the rules that are active in a version that is not ``known``."""
    return {rule[0] for rule, signals in history.items() if signals.active and rule not in known}


def rule_signals(raised: int, retracted: int, clause: str) -> RuleSignals:
    """From the number of signals of each kind, some of which may be missing."""
    return RuleSignals(max(2 * raised - 1, 2 * retracted), clause)


class LedgerHistory:
    """Signals that the ledger has but the traces of the last checkpoint do not know, by tenant and
    trace id. Each table takes the entries of its traces. Not thread-safe: use one thread at a
    time."""

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, SignalHistory]] = {}

    def __len__(self) -> int:
        return sum(len(traces) for traces in self._tenants.values())

    def of(self, tenant: str) -> dict[str, SignalHistory]:
        """A tenant's entries by trace id: always the same object, which callers may take entries
        from."""
        return self._tenants.setdefault(tenant, {})

    def note(self, signals: Iterable[Signal]) -> None:
        """Add stored signals, in any order. Signals raised early are skipped: no later span can
        undo them, and they are found again under the same id."""
        for signal in signals:
            if signal.kind is Kind.RAISED and signal.early:
                continue
            emitted = 2 * signal.episode + (1 if signal.kind is Kind.RAISED else 2)
            traces = self.of(signal.tenant)
            rule = (signal.rule_id, signal.rule_version)
            traces[signal.trace_id] = merged(
                traces.get(signal.trace_id, {}), {rule: RuleSignals(emitted, signal.clause)}
            )

    def keep(self, wanted: Callable[[str, str], bool]) -> None:
        """Forget everything except ``wanted(tenant, trace id)``."""
        for tenant, traces in self._tenants.items():
            for trace_id in [each for each in traces if not wanted(tenant, each)]:
                del traces[trace_id]

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        self._tenants.pop(tenant, None)

    def saved(self) -> dict[str, Any]:
        """All entries as JSON, for a checkpoint."""
        return {
            tenant: {trace_id: history_to_json(history) for trace_id, history in traces.items()}
            for tenant, traces in self._tenants.items()
            if traces
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Add what :meth:`saved` returned."""
        for tenant, traces in saved.items():
            self.of(tenant).update({each: history_from_json(rows) for each, rows in traces.items()})


def history_to_json(history: SignalHistory) -> list[list[Any]]:
    """Rows (rule id, version, signals emitted, clause)."""
    return [[*rule, *signals] for rule, signals in sorted(history.items())]


def history_from_json(rows: Iterable[Iterable[Any]]) -> SignalHistory:
    """The inverse of :func:`history_to_json`."""
    return {
        (rule_id, version): RuleSignals(emitted, clause)
        for rule_id, version, emitted, clause in rows
    }
