"""Builds what query nodes of a cluster share: how far exports are, alerts, and what people decided.
One process has it all on its disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from betrace.channels import ThreadRunner
from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alerts import DUTY as ALERTS
from betrace.service.export.turns import Turns
from betrace.service.storage.alert_store import SavedAlerts
from betrace.service.storage.ledger.base import LedgerEntries
from betrace.service.storage.local_stores import LocalStores
from betrace.service.storage.signal_queues import LedgerQueues, SignalQueues

if TYPE_CHECKING:
    from betrace.service.cluster.query.node import ClusterConnection
    from betrace.service.cluster.query.shared_triage import SharedTriage
    from betrace.service.cluster.query.tenant_names import TenantNames


@dataclass(frozen=True, slots=True)
class Sharing:
    """Where exports and alerts read signals and keep their progress. ``turns`` is None if this
    process sends everything; ``triage`` changes mutes and acknowledgements at all query nodes;
    ``followers`` run at a query node."""

    queues: SignalQueues
    alerts: SavedAlerts
    turns: Turns | None = None
    triage: SharedTriage | None = None
    followers: tuple[Callable[[], Awaitable[None]], ...] = ()


def alone(entries: LedgerEntries, stores: LocalStores) -> Sharing:
    """For one process."""
    return Sharing(LedgerQueues(entries), stores.alerts)


def shared(
    cluster: ClusterConnection,
    settings: Settings,
    stores: LocalStores,
    threads: ThreadRunner,
    names: TenantNames,
) -> Sharing:
    """For a query node. ``names`` knows the deleted tenants."""
    from betrace.service.cluster.query.applied import FILE, read_cursors
    from betrace.service.cluster.query.out_queues import OutQueues
    from betrace.service.cluster.query.sending import SharedTurns
    from betrace.service.cluster.query.shared_alerts import SharedAlerts
    from betrace.service.cluster.query.shared_triage import SharedTriage

    data = settings.storage.path
    applied = {str(p): upto for p, upto in read_cursors(data / FILE).applied.items()}

    def begin(name: str) -> dict[str, int] | None:
        """Where an export begins that this node sent on its own, before 0.4."""
        return applied if (data / "export" / f"{name}.json").exists() else None

    if settings.export.destinations or settings.alerts.destinations:
        cluster.recent.used = True
    triage = SharedTriage(cluster.shared, stores.triage, threads, names)
    alerts: SavedAlerts = stores.alerts
    followers: list[Callable[[], Awaitable[None]]] = [triage.watch]
    if settings.alerts.destinations:
        before = applied if stores.alerts.progress() is not None else None
        duty = cluster.duties.get(ALERTS)
        alerts = shared_alerts = SharedAlerts(cluster.shared, duty, stores.alerts, before)
        followers.append(shared_alerts.watch)
    return Sharing(
        OutQueues(cluster.partitions, cluster.out, cluster.last, cluster.recent, names),
        alerts,
        SharedTurns(cluster.shared, cluster.duties, begin),
        triage,
        tuple(followers),
    )
