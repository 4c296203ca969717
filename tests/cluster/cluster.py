"""A whole cluster on this machine: NATS servers, edges, evaluators and query nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cluster.links import Link
from tests.cluster.nodes import Node
from tests.crash.victim import START_SECONDS
from tests.crash.workload import write_rules
from tests.support.nats_servers import NatsServers
from tests.support.process import environment


class ServersAway(Exception):
    """A command could not run, because the NATS servers did not answer."""


class Cluster:
    """Use it as a context manager: it starts everything, and ends all of its processes."""

    def __init__(
        self,
        directory: Path,
        edges: int = 2,
        evaluators: int = 3,
        servers: int = 3,
        queries: int = 2,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.servers = NatsServers(directory / "nats", servers)
        self._edges, self._evaluators, self._queries = edges, evaluators, queries
        self.edges: list[Node] = []
        self.evaluators: list[Node] = []
        self.queries: list[Node] = []
        self._joined = evaluators

    def __enter__(self) -> Cluster:
        self.servers.start()
        self.queries = [self._node(f"query-{n}", "query") for n in range(1, self._queries + 1)]
        for query in self.queries:
            (query.directory / "rules").mkdir(exist_ok=True)
        write_rules(self.queries[0].directory / "rules")  # the others get them from the cluster
        self.edges = [self._node(f"edge-{n}", "edge") for n in range(1, self._edges + 1)]
        self.evaluators = [
            self._node(f"evaluator-{n}", "evaluator") for n in range(1, self._evaluators + 1)
        ]
        self.command("init")
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.close()
        self.servers.close()

    @property
    def nodes(self) -> list[Node]:
        """All nodes that should run."""
        return [*self.queries, *self.edges, *self.evaluators]

    def join(self) -> Node:
        """Start one more evaluator."""
        self._joined += 1
        node = self._node(f"evaluator-{self._joined}", "evaluator")
        self.evaluators.append(node)
        node.start()
        return node

    @property
    def query(self) -> Node:
        """The first query node."""
        return self.queries[0]

    def command(self, *arguments: str, seconds: float = START_SECONDS) -> str:
        """Run ``betrace cluster`` on the query node's configuration; returns what it prints. Raises
        :exc:`ServersAway` if no NATS server answers it. After ``seconds`` it is killed, and
        :exc:`subprocess.TimeoutExpired` is raised."""
        done = subprocess.run(
            [
                sys.executable, "-m", "betrace.service", "cluster",
                *arguments, "--config", str(self.query.config),
            ],
            env=environment(**self.query.settings),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )  # fmt: skip
        if done.returncode != 0 and "NATS" in done.stderr:
            raise ServersAway(done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _node(self, name: str, roles: str) -> Node:
        links = [Link((server.host, server.port)) for server in self.servers.servers]
        return Node(self.directory, name, roles, links)
