"""All alerts: a pure function of the signals and the clock, which the ledger and the alert store
make durable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from betrace.service.export.alerts.alert import Alert, Delivered, State
from betrace.service.signals import Kind, Signal
from betrace.service.storage.alert_store import AlertKey
from betrace.service.telemetry import events

RESENT_NS = 15 * 60 * 10**9
"""Resolved alerts are kept this long for Alertmanagers, as Prometheus does: one that was restarted
must hear of them."""


class AlertBook:
    """The alerts by tenant and rule.

    ``resolve_after_ns`` is the quiet time after which an alert ends, ``most`` the maximum number of
    alerts. ``pages_nobody`` says whether a raised signal starts no alert, because its rule is muted
    or only tried out; ``muted_now`` whether a tenant's rule is muted at this moment.
    """

    def __init__(
        self,
        resolve_after_ns: int,
        most: int,
        pages_nobody: Callable[[Signal], bool],
        muted_now: Callable[[str, str], bool],
    ) -> None:
        self.resolve_after_ns = resolve_after_ns
        self._most = most
        self._pages_nobody = pages_nobody
        self._muted_now = muted_now
        self._alerts: dict[AlertKey, Alert] = {}
        self._changed: dict[AlertKey, None] = {}
        self._full = False
        self.firing = 0
        """Alerts that fire now."""
        self.started = 0
        """Alerts that began since the start."""
        self.resolved: Counter[str] = Counter({"quiet": 0, "retracted": 0, "muted": 0})
        """Alerts that ended since the start, by reason."""
        self.overflowed = 0
        """Signals without an alert, because there were too many."""

    def __len__(self) -> int:
        return len(self._alerts)

    def __iter__(self) -> Iterator[Alert]:
        return iter(self._alerts.values())

    def restore(self, alerts: Iterable[Alert]) -> None:
        """Begin with these alerts."""
        for alert in alerts:
            self._alerts[alert.tenant, alert.rule] = alert
        self._count_firing()

    def clear(self) -> None:
        """Forget all alerts, which stay as they are saved."""
        self._alerts.clear()
        self._changed.clear()
        self._count_firing()

    def add(self, signals: Iterable[Signal], now: int) -> None:
        """Follow signals in the order of the ledger."""
        for signal in signals:
            key = signal.tenant, signal.rule_id
            alert = self._alerts.get(key)
            if signal.kind is Kind.RAISED:
                if not self._pages_nobody(signal):
                    self._raise(key, alert, signal, now)
            elif alert is not None and not alert.ended_ns:
                alert.retract(signal, now)
                self._changed[key] = None
                if alert.ended_ns:
                    self._note_end(alert, "retracted")
        self._count_firing()

    def _raise(self, key: AlertKey, alert: Alert | None, signal: Signal, now: int) -> None:
        if alert is None or (alert.ended_ns and self._over(alert)):
            if alert is None and len(self._alerts) >= self._most and not self._make_room():
                self._overflow(signal)
                return
            alert = self._alerts[key] = Alert.begin(signal, now)
            self._note_start(alert)
        elif alert.ended_ns:
            alert.reopen(now)
            self._note_start(alert)
        alert.add(signal, now)
        self._changed[key] = None

    @staticmethod
    def _over(alert: Alert) -> bool:
        """Whether an alert that ended is over for receivers too, so that the next one is new."""
        had = alert.delivered.values()
        return all(each.state is State.RESOLVED for each in had) and (bool(had) or alert.withdrawn)

    def _make_room(self) -> bool:
        """Remove an alert that is only kept to be sent again."""
        for key, alert in self._alerts.items():
            if alert.ended_ns and self._over(alert):
                del self._alerts[key]
                self._changed[key] = None
                return True
        return False

    def _overflow(self, signal: Signal) -> None:
        self.overflowed += 1
        if not self._full:
            self._full = True
            events.ALERTS_FULL(most=self._most, tenant=signal.tenant, rule=signal.rule_id)

    def expire(self, now: int) -> None:
        """End the alerts of rules that are quiet or muted."""
        for key, alert in self._alerts.items():
            if alert.ended_ns:
                continue
            quiet = alert.quiet_ns(self.resolve_after_ns)
            if self._muted_now(*key):
                alert.end(now, now, withdrawn=True)
                self._note_end(alert, "muted")
            elif quiet <= now:
                alert.end(quiet, now)
                self._note_end(alert, "quiet")
            else:
                continue
            self._changed[key] = None
        self._count_firing()

    def deliver(self, key: AlertKey, destination: str, state: State, now: int) -> None:
        """Note that a destination accepted an alert in this state."""
        alert = self._alerts.get(key)
        if alert is None:  # its tenant was deleted meanwhile
            return
        had = alert.delivered.get(destination)
        if had is None or had.state is not state:
            alert.delivered[destination] = Delivered(state, now)
            self._changed[key] = None

    def tidy(self, destinations: list[str], keep_ns: int, now: int) -> None:
        """Remove alerts that ended ``keep_ns`` ago and that all destinations know of. Destinations
        that are no longer configured are forgotten."""
        for key, alert in list(self._alerts.items()):
            for name in alert.delivered.keys() - set(destinations):
                del alert.delivered[name]
                self._changed[key] = None
            if alert.settled(destinations) and now >= alert.ended_ns + keep_ns:
                del self._alerts[key]
                self._changed[key] = None
        if len(self._alerts) < self._most:
            self._full = False

    def forget(self, tenant: str) -> None:
        """Remove the alerts of a tenant without telling anyone."""
        for key in [key for key in self._alerts if key[0] == tenant]:
            del self._alerts[key]
            self._changed[key] = None
        self._count_firing()

    def take_changes(self) -> dict[AlertKey, bytes | None]:
        """The alerts that changed since the last call, to be saved; None for removed ones."""
        changed, self._changed = self._changed, {}
        found: dict[AlertKey, bytes | None] = {}
        for key in changed:
            alert = self._alerts.get(key)
            found[key] = None if alert is None else alert.dump()
        return found

    def put_back(self, keys: Collection[AlertKey]) -> None:
        """Return changes that could not be saved."""
        self._changed = dict.fromkeys(keys) | self._changed

    def _count_firing(self) -> None:
        self.firing = sum(not alert.ended_ns for alert in self._alerts.values())

    def _note_start(self, alert: Alert) -> None:
        self.started += 1
        events.ALERT_FIRING(tenant=alert.tenant, rule=alert.rule)

    def _note_end(self, alert: Alert, reason: str) -> None:
        self.resolved[reason] += 1
        events.ALERT_RESOLVED(
            tenant=alert.tenant, rule=alert.rule, count=alert.count, reason=reason
        )
