"""What `betrace cluster status` shows: servers, nodes and partitions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import trio

from betrace.service.cluster import output
from betrace.service.cluster.lease_keys import lease_key
from betrace.service.cluster.membership import beat_key, drain_key, read_heartbeat
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream import resize, survey
from betrace.service.storage.jetstream.bucket import ConfigBucket, Entry
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.generations import Generation
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.survey import ServerState, StreamState

_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class NodeState:
    """A process of the cluster. ``alive`` is whether its heartbeat moved during the survey."""

    name: str
    roles: tuple[str, ...]
    alive: bool
    draining: bool


@dataclass(frozen=True, slots=True)
class PartitionOverview:
    """A partition. ``lag`` is the number of messages that its owner has not applied. ``epoch``
    and ``lag`` are None if the output cannot be read."""

    partition: int
    owner: str
    epoch: int | None
    messages: int
    lag: int | None
    leader: str
    output_leader: str
    replicas: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All of it. ``problems`` has a sentence for each thing that needs attention."""

    servers: list[ServerState]
    nodes: list[NodeState]
    partitions: list[PartitionOverview]
    problems: list[str]
    generations: list[Generation]
    """Oldest first; spans go to the last one."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


async def survey_cluster(client: NatsClient, settings: ClusterSettings) -> ClusterState:
    """Look at everything; takes ``cluster.lease_seconds``, to see heartbeats move."""
    generations, unfinished = await resize.progress(client, settings)
    layout = Layout.of(settings, generations)
    streams = {each.name: each for each in await survey.survey_streams(client, layout)}
    active = [*unfinished, *generations.current.partitions]
    members = ConfigBucket(client, layout.members_bucket)
    before = await members.entries()
    start = trio.current_time()
    servers = await survey.survey_servers(settings)
    leases = ConfigBucket(client, layout.leases_bucket)
    owners = await Leases(leases, settings.lease_seconds).owners()
    partitions = await _partitions(client, layout, active, streams, owners)
    await trio.sleep(max(0.0, start + settings.lease_seconds - trio.current_time()))
    nodes = _nodes(before, await members.entries())
    problems = [*_server_problems(servers), *_stream_problems(streams.values())]
    problems += _owner_problems(nodes, partitions)
    if unfinished:
        problems.append(
            f"the change to {generations.current.count} partitions is under way: "
            f"{len(unfinished)} former partitions are not finished"
        )
    return ClusterState(servers, nodes, partitions, problems, list(generations))


async def _partitions(
    client: NatsClient,
    layout: Layout,
    active: list[int],
    streams: dict[str, StreamState],
    owners: dict[str, str],
) -> list[PartitionOverview]:
    found: dict[int, PartitionOverview] = {}
    limit = trio.CapacityLimiter(_AT_ONCE)

    async def one(partition: int) -> None:
        spans = streams[layout.spans_stream(partition)]
        out = streams[layout.out_stream(partition)]
        epoch = number = lag = None
        async with limit:
            try:
                found_epoch = await FencedLog(client, layout, partition).epoch()
                epoch = found_epoch.number if found_epoch else 0
                number = await _applied(client, layout, partition)
            except NatsUnavailable:
                pass  # reported as a stream without leader
        if number is not None and spans.leader:
            lag = max(0, spans.last - number)
        found[partition] = PartitionOverview(
            partition,
            owners.get(lease_key(partition), ""),
            epoch,
            spans.messages,
            lag,
            spans.leader,
            out.leader,
            min(spans.replicas, out.replicas),
            spans.bytes + out.bytes,
        )

    async with trio.open_nursery() as nursery:
        for partition in active:
            nursery.start_soon(one, partition)
    return [found[partition] for partition in sorted(found)]


async def _applied(client: NatsClient, layout: Layout, partition: int) -> int | None:
    """The sequence up to which the partition's output covers its spans."""
    stream, body = layout.out_stream(partition), {"last_by_subj": layout.out_subject(partition)}
    message = await client.call(lambda nats: nats.leader_get(stream, body))
    if message is None:
        return 0
    try:
        return output.unpack(message.data).upto
    except output.OutputCorrupt:
        return None


def _nodes(before: list[Entry], after: list[Entry]) -> list[NodeState]:
    revisions = {entry.key: entry.revision for entry in before}
    present = {entry.key for entry in after}
    nodes = []
    for entry in after:
        if not entry.key.startswith(beat_key("")):
            continue
        member, _ = read_heartbeat(entry)
        moved = revisions.get(entry.key) != entry.revision
        draining = member.draining or drain_key(member.name) in present
        nodes.append(NodeState(member.name, member.roles, moved, draining))
    return sorted(nodes, key=lambda node: node.name)


def _server_problems(servers: list[ServerState]) -> list[str]:
    return [f"NATS server {each.address}: {each.error}" for each in servers if each.error]


def _stream_problems(streams: Iterable[StreamState]) -> list[str]:
    problems = []
    for each in streams:
        if not each.exists:
            problems.append(f"{each.name} does not exist; run: betrace cluster init")
        elif not each.leader:
            problems.append(f"{each.name} has no leader; start the NATS servers that are down")
        elif each.replicas < each.config["num_replicas"]:
            problems.append(
                f"{each.name} is complete on {each.replicas} of {each.config['num_replicas']} "
                "servers; the others are down or catching up"
            )
    return problems


def _owner_problems(nodes: list[NodeState], partitions: list[PartitionOverview]) -> list[str]:
    problems = [
        f"node {node.name} shows no heartbeat; if it does not come back, its partitions move"
        for node in nodes
        if not node.alive
    ]
    without = [str(each.partition) for each in partitions if not each.owner]
    if without:
        problems.append(
            f"partitions without owner: {', '.join(without)}; start `betrace serve --role "
            "evaluator`"
        )
    return problems
