"""Appends the markers of rules to a partition's log, and waits for the first ones."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.first_rules import NOT_PUBLISHED, FirstRules
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.evaluator.status import PartitionStatus
from betrace.service.storage.jetstream.envelope import RulesMarker, pack
from betrace.service.telemetry import events

_log = logging.getLogger("service.cluster.owner")

_RETRY_SECONDS = 0.5


class MarkerAppends:
    """The markers that an owner appends in one epoch.

    Args:
      append: appends a message with an id; returns whether that succeeded.
    """

    def __init__(
        self,
        parts: OwnerParts,
        status: PartitionStatus,
        state: PartitionState,
        append: Callable[[bytes, str], Awaitable[bool]],
    ) -> None:
        self._parts = parts
        self._status = status
        self._state = state
        self._append = append
        self._sent: dict[str, int] = {}  # revisions by tenant

    async def run(self) -> None:
        """Append a marker for each change, until cancelled."""
        while True:
            changed = self._parts.rules.changed
            if await self._send():
                await changed.wait()
            else:
                await trio.sleep(_RETRY_SECONDS)

    async def first(self) -> list[RulesMarker]:
        """The rules that the log begins with; waits until there are some."""
        parts, status = self._parts, self._status
        first = FirstRules(parts.spans, parts.threads, status.partition)
        while True:
            changed = parts.rules.changed
            try:
                if await first.are_complete():
                    return first.markers
            except TransientError as error:
                _log.debug("partition %d cannot be read: %s", status.partition, error)
                await trio.sleep(_RETRY_SECONDS)
                continue
            if parts.rules.published:
                if not await self._send():
                    await trio.sleep(_RETRY_SECONDS)
                continue
            if status.waiting is None:
                status.waiting = NOT_PUBLISHED
                events.PARTITION_WAITS(partition=status.partition, reason=NOT_PUBLISHED)
            await changed.wait()

    async def _send(self) -> bool:
        """Append markers for the rules that the partition does not have; whether all were
        appended."""
        known = self._state.rules_revisions | self._sent
        for rules in self._parts.rules.newer_than(known):
            marker = RulesMarker(rules.tenant, rules.revision, rules.definitions)
            if not await self._append(pack(marker), f"rules-{rules.tenant}-{rules.revision}"):
                return False
            self._sent[rules.tenant] = rules.revision
        return True
