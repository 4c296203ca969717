"""A whole cluster on this machine, with the load test's rules, and the CPU of its processes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from betrace.service.config.cluster import ClusterSettings
from perf.lib.target import cpu_seconds
from perf.lib.workload import write_rules
from tests.support.cluster_processes import Cluster, Node
from tests.support.nats_servers import NatsServers

READY_SECONDS = 600.0
SETTLE_SECONDS = 300.0
IDLE_SECONDS = 2.0

Json = dict[str, Any]


@dataclass(slots=True)
class WholeCluster:
    """Processes of all roles, and their NATS servers."""

    nats: NatsServers
    settings: ClusterSettings
    query: Node
    edges: list[Node]
    evaluators: list[Node]
    cluster: Cluster
    stack: ExitStack

    def cpu(self) -> dict[str, float]:
        """Seconds of CPU, in user and system mode, by role, and of the NATS servers."""

        def used(pids: list[int]) -> float:
            return sum(cpu_seconds(psutil.Process(pid)) for pid in pids)

        return {
            "edge": used([node.process.pid for node in self.edges]),
            "evaluator": used([node.process.pid for node in self.evaluators]),
            "query": used([self.query.process.pid]),
            "servers": used([server.pid for server in self.nats.servers]),
        }

    def join(self, name: str) -> Node:
        """Start one more evaluator."""
        options = {"traces__idle_seconds": f"{IDLE_SECONDS:g}"}
        node = self.stack.enter_context(self.cluster.running("evaluator", name, **options))
        self.evaluators.append(node)
        return node

    def partitions(self) -> list[Json]:
        """What the query node says of each partition."""
        found: list[Json] = self.query.get("/api/cluster").json()["partitions"]
        return found

    def settle(self, spans: int) -> None:
        """Wait until so many spans are evaluated, their traces are closed, and everything is
        stored: nothing changes any more.

        Raises:
          TimeoutError: it took too long.
        """
        end, before = time.monotonic() + SETTLE_SECONDS, None
        while time.monotonic() < end:
            found = self.partitions()
            done = [(each["evaluatedTo"], each["applied"], each["lag"]) for each in found]
            evaluated = sum(int(each["counts"]["spans"]) for each in found)
            if done == before and evaluated >= spans and not any(lag for _, _, lag in done):
                return
            before = done
            time.sleep(1)  # each request costs the query node CPU, which is counted
        raise TimeoutError("the cluster did not finish its work")


def wait_owned(cluster: WholeCluster) -> None:
    """Wait until each partition has an owner and the rules.

    Raises:
      TimeoutError: it took too long.
    """
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        found = [samples(node) for node in cluster.evaluators]
        owned = sum(sum(by_partition(each, "betrace_partition_current").values()) for each in found)
        applied = [by_partition(each, "betrace_partition_applied_sequence") for each in found]
        ruled = {partition for each in applied for partition, upto in each.items() if upto}
        if owned == cluster.settings.partitions == len(ruled):
            return
        time.sleep(0.5)
    raise TimeoutError("some partitions have no owner or no rules")


def samples(node: Node) -> dict[str, float]:
    """The node's metrics."""
    return node.samples(node.metrics if node.metrics != "None" else node.api)


def by_partition(found: dict[str, float], name: str) -> dict[int, float]:
    """The samples of a metric by partition."""
    start = f'{name}{{partition="'
    return {
        int(key[len(start) :].partition('"')[0]): value
        for key, value in found.items()
        if key.startswith(start)
    }


@contextmanager
def whole_cluster(
    servers: int, partitions: int, edges: int = 1, evaluators: int = 1, rules: int = 100
) -> Iterator[WholeCluster]:
    """Run a cluster with so many nodes; each message is kept by all NATS servers."""
    options = {"traces__idle_seconds": f"{IDLE_SECONDS:g}"}
    with tempfile.TemporaryDirectory(prefix="betrace-perf-") as folder, ExitStack() as stack:
        directory = Path(folder)
        nats = stack.enter_context(NatsServers(directory / "nats", servers))
        settings = nats.settings(partitions=partitions)
        cluster = Cluster(directory, settings)
        cluster.init()
        (directory / "query" / "rules").mkdir(parents=True)
        write_rules(directory / "query" / "rules", [], rules)
        query = stack.enter_context(cluster.running("query", "query", **options))
        found = WholeCluster(nats, settings, query, [], [], cluster, stack)
        for number in range(evaluators):
            found.join(f"evaluator-{number}")
        for number in range(edges):
            edge = stack.enter_context(cluster.running("edge", f"edge-{number}", **options))
            found.edges.append(edge)
        wait_owned(found)
        yield found
