"""What ``betrace demo --cluster`` kills, and how it sees that the others take over."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Awaitable, Callable

import httpx
import trio

from betrace.service.cli.common import Failure
from betrace.service.cli.demo.collector import Collector
from betrace.service.cli.demo.local_cluster import LocalCluster
from betrace.service.cli.demo.processes import Node
from betrace.service.cluster.lease_keys import owners_by_partition
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.nats import Nats
from betrace.service.storage.jetstream.setup import stream_info

WAIT_SECONDS = 180.0
_POLL_SECONDS = 0.1
_MORE_REQUESTS = 5  # acknowledged while an edge is down
_BREATHER_SECONDS = 1.0


class Outages:
    """Kills processes of a cluster and starts them again; ``say`` prints what happens."""

    def __init__(
        self, cluster: LocalCluster, collector: Collector, say: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._collector = collector
        self._say = say
        self._layout = Layout.of(cluster.settings)
        self.done: list[str] = []
        """What was killed, in order."""

    def all(self) -> list[Callable[[], Awaitable[None]]]:
        """One of each kind."""
        return [self.evaluator, self.edge, self.leader, self.query]

    async def evaluator(self) -> None:
        """Kill the evaluator with the most partitions; wait until others have them."""
        owned = defaultdict(list)
        for partition, owner in (await self._owners()).items():
            owned[owner].append(partition)
        victim = max(
            self._cluster.evaluators, key=lambda node: (len(owned[node.name]), random.random())
        )
        lost = owned[victim.name]
        self._kill_said(victim.name, f"it evaluates the partitions {_names(lost)}")
        began = trio.current_time()
        await victim.kill()
        owners: dict[int, str] = {}

        async def moved() -> bool:
            owners.update(await self._owners())
            return all(owners.get(each, victim.name) != victim.name for each in lost)

        await self._until(moved, f"the partitions of {victim.name} did not move")
        new = ", ".join(f"{each} to {owners[each]}" for each in lost)
        self._say(f"{_since(began)} later its partitions have moved: {new}")
        await victim.start()
        await self._repaired(victim.name)

    async def edge(self) -> None:
        """Kill an edge; wait until the other has taken requests in its place."""
        victim = random.choice(self._cluster.edges)
        before = self._collector.repeated
        self._kill_said(victim.name, "the client sends what it did not acknowledge to the other")
        await victim.kill()
        at = self._collector.acknowledged

        async def taken() -> bool:
            return self._collector.acknowledged >= at + _MORE_REQUESTS

        await self._until(taken, "no edge acknowledged spans")
        self._say(
            f"the other edge has acknowledged {self._collector.acknowledged - at} requests; "
            f"{self._collector.repeated - before} attempts failed and were repeated"
        )
        await victim.start()
        await self._repaired(victim.name)

    async def leader(self) -> None:
        """Kill the NATS server that leads a partition's stream; wait for a new leader."""
        stream = self._layout.spans_stream(random.randrange(self._layout.partitions))
        names = {server.name: server for server in self._cluster.servers}
        leader = ""

        async def led() -> bool:
            nonlocal leader
            leader = await self._leader(stream)
            return leader in names

        await self._until(led, f"{stream} has no leader")
        victim = names[leader]
        self._kill_said(victim.name, f"it leads {stream}")
        began = trio.current_time()
        await victim.kill()

        async def elected() -> bool:
            return await led() and leader != victim.name

        await self._until(elected, f"{stream} got no new leader")
        self._say(f"{_since(began)} later {leader} leads it")
        await victim.start()
        await self._repaired(victim.name)

    async def query(self) -> None:
        """Kill a query node; wait until another one has new signals."""
        victim, other = random.sample(self._cluster.queries, 2)
        self._kill_said(victim.name, f"{other.name} answers in its place")
        await victim.kill()
        async with httpx.AsyncClient(trust_env=False, timeout=WAIT_SECONDS) as client:
            before = await _signals(client, other)
            found = before

            async def more() -> bool:
                nonlocal found
                found = await _signals(client, other)
                return found > before

            await self._until(more, f"{other.name} got no new signals")
        self._say(f"{other.name} has stored {found - before} more signals since")
        await victim.start()
        await self._repaired(victim.name)

    def _kill_said(self, name: str, role: str) -> None:
        self.done.append(name)
        self._say(f"killing {name} (SIGKILL): {role}")

    async def _repaired(self, name: str) -> None:
        self._say(
            f"{name} runs again; {self._collector.acknowledged} requests acknowledged so far, "
            f"{self._collector.waiting} wait"
        )
        await trio.sleep(_BREATHER_SECONDS)

    async def _owners(self) -> dict[int, str]:
        """The owner of each lease, by partition."""
        bucket = ConfigBucket(self._cluster.client, self._layout.leases_bucket)
        found = await Leases(bucket, self._cluster.settings.lease_seconds).owners()
        return owners_by_partition(found)

    async def _leader(self, stream: str) -> str:
        async def ask(nats: Nats) -> str:
            info = await stream_info(nats, stream) or {}
            return str((info.get("cluster") or {}).get("leader") or "")

        return await self._cluster.client.call(ask)

    async def _until(self, done: Callable[[], Awaitable[bool]], otherwise: str) -> None:
        with trio.move_on_after(WAIT_SECONDS):
            while True:
                try:
                    if await done():
                        return
                except NatsUnavailable:
                    pass  # a server is down; ask again
                await trio.sleep(_POLL_SECONDS)
        raise Failure(f"{otherwise} within {WAIT_SECONDS:g} s")


async def _signals(client: httpx.AsyncClient, node: Node) -> int:
    """The number of signals that a query node has from the last hour."""
    response = await client.get(f"{node.addresses['api']}/api/v1/signals/summary")
    return int(response.json()["total"])


def _names(partitions: list[int]) -> str:
    return ", ".join(map(str, sorted(partitions))) or "of nobody"


def _since(began: float) -> str:
    return f"{trio.current_time() - began:.1f} s"
