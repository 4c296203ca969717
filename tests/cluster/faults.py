"""The faults of a campaign, chosen at random, each repaired after a while.

At most one NATS server, one evaluator and one edge are down at the same time, and now and then a
majority of the servers: then nothing is acknowledged, and nothing may be lost.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from tests.cluster.cluster import Cluster, ServersAway
from tests.cluster.nodes import LEASE_SECONDS, PARTITIONS, Node
from tests.cluster.rule_changes import RuleChanges

LEAST_EVALUATORS, MOST_EVALUATORS = 2, 4
MOST_PARTITIONS = 4 * PARTITIONS
RESIZE_SECONDS = 300

KINDS = {
    "evaluator killed": "evaluator",
    "evaluator frozen": "evaluator",
    "evaluator cut off": "evaluator",
    "evaluator joins": "evaluator",
    "evaluator leaves": "evaluator",
    "evaluator drained": "evaluator",
    "edge killed": "edge",
    "edge frozen": "edge",
    "edge cut off": "edge",
    "server killed": "server",
    "server frozen": "server",
    "quorum lost": "server",
    "query node killed": "query",
    "rules changed": "rules",
    "partitions doubled": "partitions",
}
"""Each fault, and the part of the cluster that is not whole until it is repaired."""


class Faults:
    """Injects faults into a running cluster."""

    def __init__(self, rng: random.Random, cluster: Cluster, rules: RuleChanges) -> None:
        self._rng = rng
        self._cluster = cluster
        self._rules = rules
        self._down: dict[str, threading.Thread] = {}
        self._partitions = PARTITIONS
        self.errors: list[BaseException] = []
        self.counts: Counter[str] = Counter()

    def inject(self, fault: str | None = None) -> str:
        """Inject a fault; returns what it is. Its repair runs in the background. By default, of two
        random faults it takes the rarer one, so that all are about equally frequent. Waits while
        an earlier fault of the same part is not repaired."""
        if fault is None:
            kinds = set(KINDS)
            if self._partitions == MOST_PARTITIONS:
                kinds.remove("partitions doubled")
            fault = min(self._rng.sample(sorted(kinds), 2), key=self.counts.__getitem__)
        part = KINDS[fault]
        if part in self._down:
            self._down[part].join()
        repair = getattr(self, "_" + fault.replace(" ", "_"))()
        if repair is not None:
            self._down[part] = threading.Thread(target=self._run, args=(repair,), daemon=True)
            self._down[part].start()
        self.counts[fault] += 1
        return fault

    def repaired(self, seconds: float) -> None:
        """Return when everything is repaired."""
        for thread in self._down.values():
            thread.join(seconds)
            assert not thread.is_alive(), "a fault could not be repaired"
        if self.errors:
            raise self.errors[0]

    def _run(self, repair: Callable[[], None]) -> None:
        try:
            repair()
        except BaseException as error:
            self.errors.append(error)

    # Evaluators

    def _evaluator(self) -> Node:
        return self._rng.choice(self._cluster.evaluators)

    def _evaluator_killed(self) -> Callable[[], None]:
        return self._kill(self._evaluator())

    def _evaluator_frozen(self) -> Callable[[], None]:
        return self._freeze(self._evaluator(), 3 * LEASE_SECONDS)

    def _evaluator_cut_off(self) -> Callable[[], None]:
        return self._cut(self._evaluator(), self._rng.uniform(1, 4) * LEASE_SECONDS)

    def _evaluator_joins(self) -> Callable[[], None] | None:
        if len(self._cluster.evaluators) == MOST_EVALUATORS:
            return self._evaluator_leaves()
        return self._cluster.join().wait_ready

    def _evaluator_leaves(self) -> Callable[[], None] | None:
        if len(self._cluster.evaluators) == LEAST_EVALUATORS:
            return self._evaluator_joins()
        node = self._evaluator()
        self._cluster.evaluators.remove(node)

        def leave() -> None:
            assert node.stop() == 0, node.log()[-3000:]
            node.close()

        return leave

    def _evaluator_drained(self) -> Callable[[], None] | None:
        node = self._evaluator()
        try:
            self._cluster.command("drain", node.name)
        except ServersAway:
            return None

        def restart() -> None:
            time.sleep(self._rng.uniform(0, 2))
            assert node.stop() == 0, node.log()[-3000:]
            node.start()
            node.wait_ready()

        return restart

    # Edges and query nodes

    def _edge(self) -> Node:
        return self._rng.choice(self._cluster.edges)

    def _edge_killed(self) -> Callable[[], None]:
        return self._kill(self._edge())

    def _edge_frozen(self) -> Callable[[], None]:
        return self._freeze(self._edge(), LEASE_SECONDS)

    def _edge_cut_off(self) -> Callable[[], None]:
        return self._cut(self._edge(), self._rng.uniform(0.2, 6))

    def _query_node_killed(self) -> Callable[[], None]:
        return self._kill(self._rng.choice(self._cluster.queries))

    def _rules_changed(self) -> None:
        self._rules.change()

    def _partitions_doubled(self) -> Callable[[], None]:
        """Resize the cluster with a command that is killed, and repeat it until the change is
        complete."""
        self._partitions *= 2
        arguments = ("resize", "--partitions", str(self._partitions), "--yes", "--wait", "30s")
        with suppress(subprocess.TimeoutExpired, ServersAway):
            self._cluster.command(*arguments, seconds=self._rng.uniform(0.5, 4))

        def repeat() -> None:
            end = time.monotonic() + RESIZE_SECONDS
            while True:
                try:
                    self._cluster.command(*arguments)
                    return
                except (ServersAway, AssertionError):  # evaluators may be away
                    if time.monotonic() > end:
                        raise
                time.sleep(0.5)

        return repeat

    # Servers

    def _server_killed(self) -> Callable[[], None]:
        server = self._rng.choice(self._cluster.servers.servers)
        server.kill()

        def restart() -> None:
            time.sleep(self._rng.uniform(0, 3))
            server.start()

        return restart

    def _server_frozen(self) -> Callable[[], None]:
        server = self._rng.choice(self._cluster.servers.servers)
        server.freeze()

        def unfreeze() -> None:
            time.sleep(self._rng.uniform(1, 8))
            server.unfreeze()

        return unfreeze

    def _quorum_lost(self) -> Callable[[], None]:
        servers = self._rng.sample(self._cluster.servers.servers, 2)
        for server in servers:
            server.kill()

        def restart() -> None:
            time.sleep(self._rng.uniform(1, 4))
            for server in servers:
                server.start()

        return restart

    # What the faults of nodes have in common

    def _kill(self, node: Node) -> Callable[[], None]:
        node.kill()

        def restart() -> None:
            time.sleep(self._rng.choice((0.0, self._rng.uniform(0, 5))))
            node.start()
            node.wait_ready()

        return restart

    def _freeze(self, node: Node, seconds: float) -> Callable[[], None]:
        node.freeze()

        def unfreeze() -> None:
            time.sleep(seconds)
            node.unfreeze()

        return unfreeze

    def _cut(self, node: Node, seconds: float) -> Callable[[], None]:
        node.cut()

        def heal() -> None:
            time.sleep(seconds)
            node.heal()

        return heal
