"""The names of tenants in the logs, as a query node reads them.

A tenant that was deleted and created again has another name in the logs
(:func:`betrace.service.tenants.log_name`). What has a former name is skipped, because it belongs to
the deleted tenant. What has a name that is not known yet must wait.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from betrace.service.cluster.tenant_entries import (
    INGESTION_KEY,
    TENANTS_PREFIX,
    unpack_tenant,
)
from betrace.service.signals import Signal, signal_id
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.tenancy.tenant import TenantState
from betrace.service.tenants import log_name, split_log_name
from betrace.service.traces.verdicts import Decided


class TenantNames:
    """Translates names. ``generations`` and ``closed`` are those of the gate, and change."""

    def __init__(self, generations: Mapping[str, int], closed: Collection[str]) -> None:
        self._generations = generations
        self._closed = closed

    def log_name(self, tenant: str) -> str:
        """The name that a tenant has in the logs now."""
        return log_name(tenant, self._generations.get(tenant, 0))

    def tenant(self, name: str) -> str | None:
        """The tenant with a name in the logs; None if it was deleted."""
        tenant, generation = split_log_name(name)
        current = generation == self._generations.get(tenant, 0)
        return tenant if current and tenant not in self._closed else None

    def unknown(self, names: Iterable[str]) -> bool:
        """Whether one of the names in the logs is of a tenant that was created again, and that this
        node does not use yet."""
        for name in names:
            tenant, generation = split_log_name(name)
            known = self._generations.get(tenant, 0)
            if generation and (
                generation > known or (generation == known and tenant in self._closed)
            ):
                return True
        return False

    def signal(self, signal: Signal) -> Signal | None:
        """A signal of the logs, with its tenant's name; None if the tenant was deleted."""
        tenant = self.tenant(signal.tenant)
        if tenant is None or tenant == signal.tenant:
            return None if tenant is None else signal
        return _renamed_signal(signal, tenant)

    def current(self, items: Sequence[Decided]) -> list[Decided]:
        """The items of tenants that are not deleted, with the names of these tenants."""
        found = []
        for item in items:
            tenant = self.tenant(item.tenant)
            if tenant == item.tenant:
                found.append(item)
            elif tenant is not None:
                found.append(_renamed(item, tenant))
        return found


async def read_names(config: ConfigBucket) -> TenantNames:
    """The names as of now, for what does not follow tenants. Raises
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable` and
    :exc:`~betrace.service.cluster.tenant_entries.TenantEntryError`."""
    entries = await config.entries(TENANTS_PREFIX)
    tenants = [unpack_tenant(each) for each in entries if each.key != INGESTION_KEY]
    return TenantNames(
        {each.name: each.generation for each in tenants},
        {each.name for each in tenants if each.state is TenantState.DELETED},
    )


class CurrentSpans:
    """Reads the frames of tenants that are not deleted from the logs of a cluster. Implements
    :class:`betrace.service.storage.partition_log.PartitionLog`."""

    def __init__(self, spans: PartitionLog, names: TenantNames) -> None:
        self._spans = spans
        self._names = names

    def read_many(
        self, tenant: str, positions: Sequence[int]
    ) -> list[Frame | FrameMissing | FrameCorrupt]:
        """The frames of a tenant under its present name."""
        return self._spans.read_many(self._names.log_name(tenant), positions)


def _renamed(item: Decided, tenant: str) -> Decided:
    closed = item.closed
    return replace(
        item,
        tenant=tenant,
        signals=[_renamed_signal(signal, tenant) for signal in item.signals],
        closed=None if closed is None else replace(closed, tenant=tenant),
    )


def _renamed_signal(signal: Signal, tenant: str) -> Signal:
    known = signal.rule_id, signal.rule_version, signal.trace_id, signal.kind, signal.episode
    return replace(signal, tenant=tenant, id=signal_id(tenant, *known))
