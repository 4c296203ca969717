"""``betrace cluster drain``: moves the partitions of an evaluator to the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from betrace.service.cli.common import FOUND, Duration, Failure, print_lines, settings_options

if TYPE_CHECKING:
    from betrace.service.config.cluster import ClusterSettings
    from betrace.service.storage.jetstream.client import NatsClient


@click.command("drain")
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let the node have partitions again.")
@click.option(
    "--wait",
    "seconds",
    type=Duration(),
    default="2m",
    show_default=True,
    help="How long to wait until the node has no partitions.",
)
@settings_options()
def drain(
    node: str, undo: bool, seconds: int, config: Path | None, overrides: dict[str, Any]
) -> None:
    """Move the partitions of NODE to the other evaluators.

    NODE gets no partitions until it is stopped and started again, or until --undo. Each partition
    pauses for a moment while it moves. Exit code 1 if NODE still has partitions after --wait: there
    is no other evaluator, or NODE does not answer.

    \b
    Example:
      betrace cluster drain evaluator-2 --config config.toml
    """
    import trio

    from betrace.service.config.load import load
    from betrace.service.storage.jetstream.client import NatsClient

    settings = load(config, overrides).cluster
    if settings is None:
        raise Failure(
            f"there is no [cluster] section in {config or 'the defaults'}; name the file that has "
            "one with --config"
        )

    async def main() -> list[int]:
        client = await NatsClient.connect(settings, "betrace cluster drain")
        try:
            return await move(client, settings, node, undo, seconds, print_lines)
        finally:
            await client.close()

    left = trio.run(main)
    if left:
        print_lines([f"{node} still has {len(left)} partitions: {', '.join(map(str, left))}"])
        sys.exit(FOUND)


async def move(
    client: NatsClient,
    settings: ClusterSettings,
    node: str,
    undo: bool,
    seconds: float,
    report: Callable[[list[str]], None],
) -> list[int]:
    """Drain the node, or let it have partitions again; returns the partitions that it still has."""
    import trio

    from betrace.service.cluster.evaluator.owner import lease_key
    from betrace.service.cluster.membership import beat_key, drain_key
    from betrace.service.storage.jetstream.bucket import ConfigBucket
    from betrace.service.storage.jetstream.layout import Layout
    from betrace.service.storage.jetstream.leases import Leases

    layout = Layout.of(settings)
    members = ConfigBucket(client, layout.members_bucket)
    leases = Leases(ConfigBucket(client, layout.leases_bucket), settings.lease_seconds)
    if undo:
        await members.delete(drain_key(node))
        report([f"{node} may have partitions again"])
        return []
    if await members.get(beat_key(node)) is None:
        names = [e.key.removeprefix(beat_key("")) for e in await members.entries(beat_key(""))]
        raise Failure(
            f"there is no node {node} in the cluster; the nodes are {', '.join(sorted(names))}"
            if names
            else "no node of the cluster is running"
        )
    await members.put(drain_key(node), b"")
    keys = {lease_key(partition): partition for partition in range(settings.partitions)}
    left: list[int] | None = None
    with trio.move_on_after(seconds):
        while left != []:
            owners = await leases.owners()
            now = sorted(keys[k] for k, owner in owners.items() if owner == node and k in keys)
            if now != left:
                report([f"{node} has {len(now)} partitions"])
            left = now
            await trio.sleep(0.2)
    return left or []
