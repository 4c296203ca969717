"""A query node: stores what the evaluators decided, answers them, and publishes the rules."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio
from prometheus_client.core import Metric

from betrace.channels import SendChannel, ThreadRunner
from betrace.service.cluster.duty import Duties
from betrace.service.cluster.lease_keys import owners_by_duty, owners_by_partition
from betrace.service.cluster.output import Counts
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query import rules as rule_sharing
from betrace.service.cluster.query.applied import (
    FILE,
    AppliedPositions,
    read_cursors,
    remove_cursors,
)
from betrace.service.cluster.query.feed import FeedTarget, OutFeed, OutLog, PartitionFeed
from betrace.service.cluster.query.index import TraceIndexServer
from betrace.service.cluster.query.open_traces import RemoteOpenTraces
from betrace.service.cluster.query.recent_output import RecentOutput
from betrace.service.cluster.query.rules import RuleSharing
from betrace.service.cluster.query.tenant_names import CurrentSpans, TenantNames
from betrace.service.cluster.query.tenants import ClusterTenants
from betrace.service.cluster.requests import serve_requests
from betrace.service.cluster.tenant_entries import INGESTION_KEY, pack_ingestion
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.pipeline.progress import InFlight
from betrace.service.rules.store import RuleStore
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.jetstream.bucket import ConfigBucket, Entry
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Tick, pack
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.fenced import Epoch
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.undecided import UndecidedStore
from betrace.service.traces.verdicts import Decided

_log = logging.getLogger("service.query")

STATUS_SECONDS = 2.0
DRAIN_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class QueryStores:
    """What a query node stores into and reads from, of the process that it is part of."""

    data: Path
    duckdb: DuckStore
    undecided: UndecidedStore
    rules: RuleStore
    closed: Collection[str]
    """The deleted tenants."""
    names: TenantNames
    waiting: Callable[[], bool]
    """Whether rows wait in fallback files for DuckDB."""
    threads: ThreadRunner


class OtherRoles(Protocol):
    """The edge and the evaluator of the same process."""

    def role_components(self) -> dict[str, dict[str, Any]]:
        """Their status by name, as ``/readyz`` shows it."""

    def role_metrics(self) -> Iterable[Metric]:
        """Their metrics."""

    def members(self) -> list[dict[str, Any]]:
        """The nodes of the cluster that are alive, as JSON."""

    def edges_are_paused(self, revision: int) -> bool:
        """Whether all edges have stored what they received before ingestion was paused by the entry
        with this revision."""


@dataclass(frozen=True, slots=True)
class ClusterConnection:
    """A query node's view of the cluster.

    ``spans`` are the streams with the spans; ``out`` returns the ``OUT`` stream of a partition;
    ``last`` returns the last sequence of one, and ``epoch`` its epoch; ``owners`` returns the
    owners of leases by key;
    ``index_subject`` is where evaluators ask; ``open_traces`` asks the owners;
    ``others`` are the process's other roles.
    """

    name: str
    """Of this node."""
    roles: tuple[str, ...]
    """Of this process."""
    identity: str
    """Of the cluster."""
    client: NatsClient
    spans: SpanStreams
    partitions: PartitionMap
    out: Callable[[int], OutLog]
    last: Callable[[int], Awaitable[int]]
    epoch: Callable[[int], Awaitable[Epoch | None]]
    owners: Callable[[], Awaitable[Mapping[str, str]]]
    config: ConfigBucket
    shared: ConfigBucket
    """What query nodes share."""
    duties: Duties
    """The work that one query node does at a time."""
    recent: RecentOutput
    index_subject: str
    open_traces: RemoteOpenTraces
    others: OtherRoles
    tenants: TenantFeed
    """The tenants as the bucket has them."""


@dataclass(eq=False)
class QueryNode:
    """The parts of a query node, and what runs them. ``followers`` follow what other query nodes
    share, forever."""

    cluster: ClusterConnection
    stores: QueryStores
    followers: Sequence[Callable[[], Awaitable[None]]] = ()
    name: str = field(init=False)
    roles: tuple[str, ...] = field(init=False)
    positions: AppliedPositions = field(init=False)
    names: TenantNames = field(init=False)
    tenants: ClusterTenants | None = field(default=None, init=False)
    """What changes and follows tenants; set before :meth:`run`."""
    feed: OutFeed | None = field(default=None, init=False)
    index: TraceIndexServer = field(init=False)
    rules: RuleSharing = field(init=False)
    _last: dict[int, int] = field(default_factory=dict, init=False)
    _owners: dict[int, str] = field(default_factory=dict, init=False)
    _duties: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.name, self.roles = self.cluster.name, self.cluster.roles
        stores, file = self.stores, self.stores.data / FILE
        saved = read_cursors(file)
        lost = saved.tenants - set(stores.duckdb.tenants()) - set(stores.closed)
        if lost:
            _log.warning(
                "DuckDB files of %d tenants are missing, so everything is applied again: %s",
                len(lost),
                ", ".join(sorted(lost)[:10]),
            )
            remove_cursors(file)  # before new files are made, which would hide the loss
        elsewhere = saved.cluster not in ("", self.cluster.identity)
        if elsewhere:
            _log.warning("the streams are those of a new cluster, so all of OUT is applied")
            remove_cursors(file)
        self.positions = AppliedPositions(() if lost or elsewhere else saved.applied.items())
        self.names = stores.names
        self.cluster.open_traces.log_name = self.names.log_name
        self.index = TraceIndexServer(stores.duckdb, self.positions, self.names, stores.waiting)
        self.rules = RuleSharing(
            self.cluster.config,
            self.cluster.shared,
            stores.rules,
            stores.data / rule_sharing.FILE,
            stores.threads,
        )

    def connect(self, channel: SendChannel[Decided], in_flight: InFlight) -> None:
        """Say where the decided traces go: the channel of storage-write."""
        self.feed = OutFeed(
            self.cluster.partitions,
            self.cluster.out,
            self.positions,
            FeedTarget(channel, in_flight, self.stores.undecided, self.names),
            self.stores.threads,
            self.stores.data / FILE,
            self.stores.duckdb.tenants,
            self.cluster.recent,
            self.cluster.identity,
        )

    async def run(self) -> None:
        """Follow the tenants, feed the stores, answer evaluators and publish rules, until
        cancelled."""
        assert self.feed is not None
        async with trio.open_nursery() as nursery:
            if self.tenants is not None:  # first, so that nothing of a deleted tenant comes back
                await nursery.start(self.tenants.run)
            nursery.start_soon(self.feed.run)
            nursery.start_soon(
                serve_requests,
                self.cluster.client,
                self.cluster.index_subject,
                self.cluster.index_subject,  # query nodes share the requests
                self.index.answer,
            )
            nursery.start_soon(self.rules.run)
            nursery.start_soon(self.cluster.duties.run)
            for follow in self.followers:
                nursery.start_soon(follow)
            nursery.start_soon(self._look_often)

    async def stop(self) -> None:
        """Read no more; what was read is on its way to the stores. Give up the duties."""
        await self.cluster.duties.stop()
        if self.feed is not None:
            await self.feed.stop()

    async def save(self) -> None:
        """Save how far the stores are."""
        if self.feed is not None:
            await self.feed.save()

    def reread(self) -> None:
        """Apply everything again, because a DuckDB file was lost. Blocks; call it in any thread."""
        if self.feed is not None:
            self.feed.rewind()

    @property
    def spans(self) -> PartitionLog:
        """The logs of the partitions, for reading the spans of tenants."""
        return CurrentSpans(self.cluster.spans, self.names)

    @property
    def ingestion_paused(self) -> bool:
        """Whether an operator has paused ingestion at all edges."""
        return self.cluster.tenants.paused

    async def pause_ingestion(self, paused: bool) -> None:
        """Pause or resume ingestion at all edges. Raises :exc:`NatsUnavailable`."""
        value = pack_ingestion(paused)
        revision = await self.cluster.config.put(INGESTION_KEY, value)
        self.cluster.tenants.note(Entry(INGESTION_KEY, value, revision))

    async def drained(self) -> None:
        """Return when everything that the edges received before ingestion was paused is evaluated,
        and on its way to this node's stores. Raises :exc:`NatsUnavailable`."""
        assert self.feed is not None
        tenants, others = self.cluster.tenants, self.cluster.others
        while not others.edges_are_paused(tenants.ingestion_revision):  # noqa: ASYNC110
            await trio.sleep(DRAIN_SECONDS)
        number = tenants.ingestion_revision
        for partition in self.cluster.partitions.current.partitions:
            tick = f"{partition}-drain-{self.name}-{number}"
            end = await self.cluster.spans.append(partition, pack(Tick()), tick)
            while self._feed_of(partition).evaluated_to < end:  # noqa: ASYNC110
                await trio.sleep(DRAIN_SECONDS)

    def applied(self) -> str:
        """The applied sequences of all partitions, in order, separated by commas."""
        total = self.cluster.partitions.generations.total
        return ",".join(str(self.positions.get(p)) for p in range(total))

    def items(self) -> dict[int, int]:
        """Items sent to the stores since the start, by partition."""
        return {} if self.feed is None else {p: s.items for p, s in self.feed.partitions.items()}

    def evaluated_spans(self) -> int:
        """Spans that the cluster has evaluated since this node started."""
        return 0 if self.feed is None else sum(s.spans for s in self.feed.partitions.values())

    def closed_traces(self) -> int:
        """Closed traces that this node has read since it started."""
        return 0 if self.feed is None else sum(s.closed for s in self.feed.partitions.values())

    def partitions(self) -> list[dict[str, Any]]:
        """How far each partition is, as JSON; without those of former generations that are
        applied to their end."""
        found = []
        for partition in self._shown():
            applied, last = self.positions.get(partition), self._last.get(partition)
            state = self._feed_of(partition)
            found.append(
                {
                    "partition": partition,
                    "owner": self._owners.get(partition),
                    "epoch": state.epoch,
                    "applied": applied,
                    "last": last,
                    "lag": None if last is None else max(0, last - applied),
                    "evaluatedTo": state.evaluated_to,
                    "logTimeNs": state.log_time_ns,
                    "counts": _counts(state.counts),
                    "problem": state.problem,
                }
            )
        return found

    def _shown(self) -> list[int]:
        feed, every = self.feed, range(self.cluster.partitions.generations.total)
        return [each for each in every if feed is None or not feed.is_complete(each)]

    def _feed_of(self, partition: int) -> PartitionFeed:
        found = self.feed.partitions.get(partition) if self.feed is not None else None
        return found or PartitionFeed()

    def shown(self) -> dict[str, Any]:
        """The state of the node, as JSON."""
        return {
            "node": self.name,
            "roles": list(self.roles),
            "nodes": self.cluster.others.members(),
            "partitions": self.partitions(),
            "duties": self._duties,
            "rulesProblem": self.rules.problem,
            "index": {"requests": self.index.requests, "behind": self.index.behind},
        }

    async def _look_often(self) -> None:
        """Ask how long the streams are and who owns the partitions, for people who look."""
        while True:
            try:
                owners = await self.cluster.owners()
                self._owners = owners_by_partition(owners)
                self._duties = owners_by_duty(owners)
                for partition in self._shown():
                    self._last[partition] = await self.cluster.last(partition)
                    await self._look_at_epoch(partition)
            except NatsUnavailable as error:
                _log.debug("the state of the cluster cannot be read: %s", error)
            await trio.sleep(STATUS_SECONDS)

    async def _look_at_epoch(self, partition: int) -> None:
        state = self._feed_of(partition)
        if state.epoch is None:
            found = await self.cluster.epoch(partition)
            state.epoch = max(state.epoch or 0, found.number if found is not None else 0)


def _counts(counts: Counts | None) -> dict[str, int] | None:
    if counts is None:
        return None
    return {
        "evaluated": counts.evaluated,
        "deadLettered": counts.dead_lettered,
        "frames": counts.frames,
        "deadFrames": counts.dead_frames,
        "spans": counts.spans,
        "markers": counts.markers,
        "ticks": counts.ticks,
        "deletedSpans": counts.deleted_spans,
    }
