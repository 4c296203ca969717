"""What `betrace cluster drain` does: it moves the partitions of an evaluator to the others."""

from __future__ import annotations

from collections.abc import Callable

import trio

from betrace.service.cli.common import Failure
from betrace.service.cluster.lease_keys import owners_by_partition
from betrace.service.cluster.membership import beat_key, drain_key
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases

_LOOK_SECONDS = 0.2


async def let_back(client: NatsClient, settings: ClusterSettings, node: str) -> None:
    """Let a drained node have partitions again."""
    members = ConfigBucket(client, Layout.of(settings).members_bucket)
    await members.delete(drain_key(node))


async def drain_node(
    client: NatsClient,
    settings: ClusterSettings,
    node: str,
    seconds: float,
    report: Callable[[int], None],
) -> list[int]:
    """Move a node's partitions, and wait up to ``seconds`` for them to move. ``report`` is called
    with the number left whenever it changes. Returns the partitions that the node still has."""
    layout = Layout.of(settings)
    members = ConfigBucket(client, layout.members_bucket)
    leases = Leases(ConfigBucket(client, layout.leases_bucket), settings.lease_seconds)
    if await members.get(beat_key(node)) is None:
        names = [e.key.removeprefix(beat_key("")) for e in await members.entries(beat_key(""))]
        raise Failure(
            f"there is no node {node} in the cluster; the nodes are {', '.join(sorted(names))}"
            if names
            else "no node of the cluster is running"
        )
    await members.put(drain_key(node), b"")
    left: list[int] | None = None
    with trio.move_on_after(seconds):
        while left != []:
            owners = owners_by_partition(await leases.owners())
            now = [partition for partition, owner in owners.items() if owner == node]
            if left is None or len(now) != len(left):
                report(len(now))
            left = now
            await trio.sleep(_LOOK_SECONDS)
    return left or []
