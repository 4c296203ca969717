"""A whole cluster as processes of this machine: three NATS servers, two edges, three evaluators and
two query nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import trio

from betrace.service.cli.common import Failure
from betrace.service.cli.demo.ports import free_ports
from betrace.service.cli.demo.processes import START_SECONDS, NatsServer, Node
from betrace.service.cli.demo.shop_process import ANY_PORT, IDLE_SECONDS, copy_rules
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.setup import set_up

SERVERS, EDGES, EVALUATORS, QUERIES, PARTITIONS = 3, 2, 3, 2, 6
_POLL_SECONDS = 0.2


class LocalCluster:
    """``program`` is nats-server; the API of the first query node listens at ``api``."""

    def __init__(self, directory: Path, program: str, api: str) -> None:
        ports = free_ports(3 * SERVERS)
        self.servers = [
            NatsServer(directory, f"nats-{n + 1}", program, ports[3 * n : 3 * n + 3])
            for n in range(SERVERS)
        ]
        self.settings = ClusterSettings(
            servers=",".join(server.url for server in self.servers),
            partitions=PARTITIONS,
            replicas=SERVERS,
            node="demo",
        )
        rules = ("--rules", str(copy_rules(directory / "rules")))
        # The others get the rules from the first one.
        self.queries = [
            self._node(directory, "query-1", "query", "--api", api, *rules),
            *(self._node(directory, f"query-{n}", "query") for n in range(2, QUERIES + 1)),
        ]
        self.edges = [self._node(directory, f"edge-{n + 1}", "edge") for n in range(EDGES)]
        self.evaluators = [
            self._node(directory, f"evaluator-{n + 1}", "evaluator") for n in range(EVALUATORS)
        ]
        self.client: NatsClient

    def _node(self, directory: Path, name: str, role: str, *more: str) -> Node:
        config = (
            f'[cluster]\nservers = "{self.settings.servers}"\nnode = "{name}"\n'
            f"partitions = {PARTITIONS}\nreplicas = {SERVERS}\nmonitoring_port = 0\n"
            f"[traces]\nidle_seconds = {IDLE_SECONDS}\n"
            '[logging]\nlevel = "warning"\n'
        )
        options = ["--role", role, "--grpc", "off", "--metrics", "off"]
        options += ["--ingest", ANY_PORT if role == "edge" else "off"]
        if "--api" not in more:
            options += ["--api", ANY_PORT]
        return Node(directory, name, config, [*options, *more])

    @property
    def nodes(self) -> list[Node]:
        """All nodes."""
        return [*self.queries, *self.edges, *self.evaluators]

    async def start(self, say: Callable[[str], None]) -> None:
        """Start everything; returns when every partition is evaluated with the rules."""
        say("starting three NATS servers, each with a copy of every message")
        for server in self.servers:
            server.configure([each.route for each in self.servers])
        await _start(self.servers)
        self.client = await NatsClient.connect(self.settings, "betrace demo")
        await set_up(self.client, self.settings)
        say(f"created the streams of {PARTITIONS} partitions")
        say("starting query-1 and edge-1; the first start compiles kernels for a minute")
        await _start([self.queries[0], self.edges[0]])  # first, so that only they compile
        say("starting query-2, edge-2 and three evaluators")
        await _start([*self.queries[1:], *self.edges[1:], *self.evaluators])
        say("all processes are ready; waiting until each partition has an owner and the rules")
        await self._ready()
        say("everything runs, and all evaluators have the rules")

    async def close(self) -> None:
        """Kill all processes."""
        async with trio.open_nursery() as nursery:
            for process in (*self.nodes, *self.servers):
                nursery.start_soon(process.kill)
        if hasattr(self, "client"):
            await self.client.close()

    async def _ready(self) -> None:
        """Wait until each partition has an owner and has read the rules."""
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            with trio.move_on_after(START_SECONDS):
                while True:
                    api = self.queries[0].addresses["api"]
                    response = await client.get(f"{api}/api/cluster")
                    partitions: list[dict[str, Any]] = response.json()["partitions"]
                    if all(p["owner"] and (p["counts"] or {}).get("markers") for p in partitions):
                        return
                    await trio.sleep(_POLL_SECONDS)
        raise Failure(f"some partitions have no owner or no rules after {START_SECONDS:g} s")


async def _start(processes: Sequence[NatsServer | Node]) -> None:
    async with trio.open_nursery() as nursery:
        for process in processes:
            nursery.start_soon(process.start)
