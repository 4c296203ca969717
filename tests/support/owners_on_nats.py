"""Evaluators in this process on real NATS servers, with a load whose signals are compared."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import trio

from betrace.channels import ThreadRunner
from betrace.service.app.evaluator import EvaluatorNode, open_evaluator
from betrace.service.cluster.evaluator.evaluator import ROLE, Evaluator
from betrace.service.cluster.membership import Membership
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.config.settings import Settings
from betrace.service.config.stages import Checkpoint, Traces
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from tests.support.cluster_load import WAIT, Load
from tests.support.nats_servers import NatsServers

PARTITIONS = range(4)

_prefixes = itertools.count()


class EvaluatorInProcess:
    """An evaluator with a client of its own, connected to ``servers``. ``change`` is called
    before it runs."""

    def __init__(
        self,
        cluster: OwnersOnNats,
        name: str,
        servers: str = "",
        change: Callable[[Evaluator], None] = lambda evaluator: None,
    ) -> None:
        self.cluster, self.name, self._change = cluster, name, change
        self.settings = cluster.all_settings
        if servers and self.settings.cluster is not None:
            own = self.settings.cluster.model_copy(update={"servers": servers})
            self.settings = self.settings.model_copy(update={"cluster": own})
        self.scope = trio.CancelScope()
        self.thaw = threading.Event()
        self.ended = trio.Event()

    async def run(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        cluster, settings = self.cluster, self.settings
        client = self.client = await NatsClient.connect(settings.cluster, self.name)
        try:
            with self.scope, ThreadRunner(self.name, 64) as threads:
                bucket = ConfigBucket(client, cluster.layout.members_bucket)
                seconds = settings.cluster.lease_seconds, settings.cluster.heartbeat_seconds
                membership = Membership(bucket, self.name, (ROLE,), *seconds)
                config = ConfigBucket(client, cluster.layout.config_bucket)
                partitions = PartitionMap(config, cluster.layout.generations)
                await partitions.load()
                node = EvaluatorNode(
                    self.name, client, cluster.layout, partitions, membership, threads
                )
                self.evaluator = open_evaluator(settings, node)
                self._change(self.evaluator)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(membership.run)
                    nursery.start_soon(partitions.run)
                    await self.evaluator.run(task_status=task_status)
                    await membership.leave()
                    nursery.cancel_scope.cancel()
        finally:
            self.thaw.set()
            client.stop()
            self.ended.set()

    @property
    def owned(self) -> list[int]:
        return self.evaluator.owned

    def kill(self) -> None:
        """End it without any cleanup."""
        self.scope.cancel()

    def freeze(self) -> None:
        """Nothing is received or sent until `thaw` is set."""
        self.client._loop.call_soon_threadsafe(self.thaw.wait)


class OwnersOnNats(Load):
    """A load, and the evaluators of this process."""

    def __init__(
        self, server: NatsServers, nursery: trio.Nursery, partitions: int = len(PARTITIONS)
    ) -> None:
        cluster = server.settings(
            prefix=f"owners{next(_prefixes)}",
            partitions=partitions,
            lease_seconds=1,
            heartbeat_seconds=0.25,
            tick_seconds=0.25,
        )
        super().__init__(cluster)
        self.servers = server
        self.nursery = nursery
        self.all_settings = Settings(
            cluster=cluster,
            traces=Traces(idle_seconds=1),
            checkpoint=Checkpoint(interval_seconds=1),
        )

    async def start(
        self,
        name: str,
        servers: str = "",
        change: Callable[[Evaluator], None] = lambda evaluator: None,
    ) -> EvaluatorInProcess:
        node = EvaluatorInProcess(self, name, servers, change)
        await self.nursery.start(node.run)
        return node


def on_a_server(test):
    return with_partitions(len(PARTITIONS))(test)


def with_partitions(partitions: int):
    def decorate(test):
        async def run(server: NatsServers) -> None:
            async with trio.open_nursery() as nursery:
                cluster = OwnersOnNats(server, nursery, partitions)
                await cluster.open()
                try:
                    await test(cluster)
                finally:
                    nursery.cancel_scope.cancel()
                    cluster.client.stop()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT):
        while not condition():
            await trio.sleep(0.02)


def current(*nodes: EvaluatorInProcess) -> Callable[[], bool]:
    """Whether these nodes own all partitions and have applied what was in the logs."""

    def check() -> bool:
        found = [s for node in nodes for s in node.evaluator.statuses if s.phase == "current"]
        expected = list(nodes[0].cluster.generations.current.partitions)
        return sorted(status.partition for status in found) == expected

    return check
