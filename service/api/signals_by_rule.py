"""Signals by rule: a series for each rule and kind, up to a maximum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import Exemplar

from betrace.service.rules.definition import Rule
from betrace.service.signals import Kind, Signal

LABELS = ("tenant", "rule", "severity", "kind", "muted")
OTHER = "(other)"  # no tenant or rule can have this name

Labels = tuple[str, ...]


class SignalsByRule:
    """Counts signals by :data:`LABELS`.

    The series of an enabled rule exist, at zero, from the first scrape after the rule is loaded,
    and until the rule is deleted. There are at most ``most_series``; signals of further rules are
    counted under the tenant and rule :data:`OTHER`.

    ``rules`` returns the rules by tenant, in a mapping that is replaced when they change. ``muted``
    says whether a signal is muted; series of muted signals begin with the first. Methods may be
    called from any thread.
    """

    def __init__(
        self,
        rules: Callable[[], Mapping[str, tuple[Rule, ...]]],
        most_series: int,
        muted: Callable[[Signal], bool],
    ) -> None:
        self._rules = rules
        self._most = most_series
        self._muted = muted
        self._lock = threading.Lock()
        self._known: Mapping[str, tuple[Rule, ...]] = {}
        self._counts: dict[Labels, int] = {}
        self._others: dict[Labels, int] = {}
        self._exemplars: dict[Labels, Exemplar] = {}

    def add(self, signals: Iterable[Signal]) -> None:
        """Count signals that are new in the ledger."""
        with self._lock:
            for signal in signals:
                muted = self._muted(signal)
                labels = _labels(signal.tenant, signal.rule_id, signal.severity, signal.kind, muted)
                counts = self._counts
                if labels not in counts and len(counts) >= self._most:
                    labels = _labels(OTHER, OTHER, signal.severity, signal.kind, muted)
                    counts = self._others
                counts[labels] = counts.get(labels, 0) + 1
                self._exemplars[labels] = Exemplar(
                    {"trace_id": signal.trace_id}, 1.0, signal.detected_at / 1e9
                )

    def counts(self) -> list[tuple[Labels, int]]:
        """The number of signals by labels."""
        self._follow_rules()
        with self._lock:
            return [*self._counts.items(), *self._others.items()]

    def exemplars(self) -> dict[Labels, Exemplar]:
        """The latest trace by labels."""
        with self._lock:
            return dict(self._exemplars)

    def _follow_rules(self) -> None:
        """Add series of new rules at zero, and remove those of rules that no longer exist."""
        rules = self._rules()
        if rules is self._known:
            return
        with self._lock:
            tenants = {labels[0] for labels in self._counts}
            ids = {tenant: {rule.id for rule in rules.get(tenant, ())} for tenant in tenants}
            for labels in [each for each in self._counts if each[1] not in ids[each[0]]]:
                del self._counts[labels]
                self._exemplars.pop(labels, None)
            for labels in self._wanted(rules):
                if len(self._counts) >= self._most:
                    break
                self._counts.setdefault(labels, 0)
            self._known = rules

    @staticmethod
    def _wanted(rules: Mapping[str, tuple[Rule, ...]]) -> Iterable[Labels]:
        for tenant, own in sorted(rules.items()):
            for rule in own:
                if rule.enabled:
                    for kind in Kind:
                        yield _labels(tenant, rule.id, rule.severity, kind)


def _labels(tenant: str, rule: str, severity: str, kind: Kind, muted: bool = False) -> Labels:
    return tenant, rule, severity, str(kind), "true" if muted else "false"
