"""Builds what exports and alerts read and where they keep their progress: in one process the ledger
and files, at a query node the ``OUT`` streams and a bucket, which all query nodes share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alerts import DUTY as ALERTS
from betrace.service.export.turns import Turns
from betrace.service.storage.alert_store import AlertStore, SavedAlerts
from betrace.service.storage.ledger.base import LedgerEntries
from betrace.service.storage.signal_queues import LedgerQueues, SignalQueues

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import ClusterConnection


@dataclass(frozen=True, slots=True)
class Sending:
    """What exports and alerts need. ``turns`` is None if this process sends everything;
    ``followers`` run at a query node."""

    queues: SignalQueues
    alerts: SavedAlerts
    turns: Turns | None = None
    followers: tuple[Callable[[], Awaitable[None]], ...] = ()


def alone(entries: LedgerEntries, alerts: AlertStore) -> Sending:
    """For one process."""
    return Sending(LedgerQueues(entries), alerts)


def shared(
    cluster: ClusterConnection, settings: Settings, alerts: AlertStore, closed: Container[str]
) -> Sending:
    """For a query node. ``closed`` are the deleted tenants."""
    from betrace.service.cluster.query.applied import FILE, read_cursors
    from betrace.service.cluster.query.out_queues import OutQueues
    from betrace.service.cluster.query.sending import SharedTurns
    from betrace.service.cluster.query.shared_alerts import SharedAlerts

    data = settings.storage.path
    applied = {str(p): upto for p, upto in read_cursors(data / FILE).applied.items()}

    def begin(name: str) -> dict[str, int] | None:
        """Where an export begins that this node sent on its own, before 0.4."""
        return applied if (data / "export" / f"{name}.json").exists() else None

    store: SavedAlerts = alerts
    followers: tuple[Callable[[], Awaitable[None]], ...] = ()
    if settings.alerts.destinations:
        before = applied if alerts.progress() is not None else None
        saved = SharedAlerts(cluster.shared, cluster.duties.get(ALERTS), alerts, before)
        store, followers = saved, (saved.watch,)
    return Sending(
        OutQueues(cluster.outs, cluster.last, cluster.recent, closed),
        store,
        SharedTurns(cluster.shared, cluster.duties, begin),
        followers,
    )
