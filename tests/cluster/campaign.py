"""Load and random faults on a real cluster, and a comparison of its signals with the oracle."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.cluster import Cluster
from tests.cluster.faults import Faults
from tests.cluster.nodes import Node
from tests.cluster.rule_changes import TENANT, RuleChanges, explained
from tests.crash.campaign import same, shown
from tests.crash.clients import Clients
from tests.crash.workload import TENANTS, Active, Traces

SETTLE_SECONDS = 300
ALL_TENANTS = (*TENANTS, TENANT)


class Campaign:
    """A cluster under load. Use it as a context manager."""

    def __init__(self, directory: Path, seed: int, rate: float = 40.0, evaluators: int = 3) -> None:
        self.cluster = Cluster(directory, evaluators=evaluators)
        self.rng = random.Random(seed)
        self._seed, self._rate = seed, rate

    def __enter__(self) -> Campaign:
        self.cluster.__enter__()
        try:
            self._begin()
        except BaseException:
            self.cluster.__exit__()
            raise
        return self

    def _begin(self) -> None:
        cluster = self.cluster
        self.rules = RuleChanges(cluster.queries)
        assert self.rules.change()
        idle = float(cluster.query.settings["traces__idle_seconds"])
        self.traces = Traces(random.Random(self._seed + 1), idle, ALL_TENANTS)
        self.faults = Faults(self.rng, cluster, self.rules)
        self.wait_for_rules()
        self.clients = Clients([edge.address for edge in cluster.edges], self.traces, self._rate)
        self.clients.start()

    def __exit__(self, *_: object) -> None:
        self.clients.abandon()
        self.cluster.__exit__()

    def wait_for_rules(self) -> None:
        """Return when each partition has the rules of all tenants, which the load relies on: a
        marker for each tenant, and one that says that rules are published."""
        end = time.monotonic() + SETTLE_SECONDS
        while any(
            (partition["counts"] or {}).get("markers", 0) <= len(ALL_TENANTS)
            for partition in self.partitions()
        ):
            assert time.monotonic() < end, "some partitions have no rules"
            time.sleep(0.2)

    def partitions(self) -> list[dict[str, Any]]:
        """What the query node says of each partition."""
        return list(self.cluster.query.get("/api/cluster")["partitions"])

    def run(self, faults: int, report: Callable[[str], None]) -> None:
        """Inject random faults, with random pauses."""
        for number in range(1, faults + 1):
            time.sleep(self.rng.choice((0.0, self.rng.uniform(0, 2))))
            report(f"fault {number} of {faults}: {self.faults.inject()}")
            assert not self.faults.errors, self.faults.errors[0]
        self.faults.repaired(SETTLE_SECONDS)

    def verify(self) -> None:
        """End the load and compare everything with the oracle."""
        self.clients.finish(SETTLE_SECONDS)
        for query in self.cluster.queries:
            self.verify_node(query)
        self.verify_accounts()

    def verify_node(self, query: Node) -> None:
        """Compare what a query node has with the oracle."""
        expected = self.traces.active()
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            found = self.found(query)
            if _without_changing(found) == expected and not explained(self.traces, found):
                break
            time.sleep(0.5)
        time.sleep(2 * self.traces.idle)  # time for signals that must not appear
        found = self.found(query)
        same(expected, _without_changing(found), f"active in the API of {query.name}")
        wrong = explained(self.traces, found)
        assert not wrong, (
            f"{len(wrong)} traces have the signals of no version of their rule: {wrong[:5]}"
        )
        self.verify_episodes(query)

    def found(self, query: Node) -> Active:
        """The active signals in the API of a query node."""
        try:
            return shown(query, ALL_TENANTS)
        except (httpx.HTTPError, AssertionError):
            return frozenset()

    def verify_episodes(self, query: Node) -> None:
        """No breach was raised twice without a retraction between."""
        counts: Counter[tuple[str, str, str, int, str]] = Counter()
        for tenant in ALL_TENANTS:
            cursor = ""
            while True:
                page = query.get(f"/api/v1/signals?limit=1000{cursor}", tenant)
                for s in page["signals"]:
                    key = (tenant, s["trace_id"], s["rule_id"], s.get("episode", 0), s["kind"])
                    counts[key] += 1
                if page["next"] is None:
                    break
                cursor = f"&cursor={page['next']}"
        doubled = [key for key, count in counts.items() if count > 1]
        assert not doubled, f"{len(doubled)} signals are doubled: {doubled[:5]}"

    def verify_accounts(self) -> None:
        """In each partition, everything appended is evaluated or dead-lettered."""
        for partition in self.partitions():
            counts = partition["counts"]
            if counts is None and partition["last"] is not None:  # added, and without traces yet
                assert not partition["evaluatedTo"], partition
                continue
            assert not counts["deadLettered"], partition
            assert counts["evaluated"] == partition["evaluatedTo"], partition


def _without_changing(found: Active) -> Active:
    return frozenset(signal for signal in found if signal[0] != TENANT)


def run_faults(directory: Path, faults: int, seed: int, report: Callable[[str], None]) -> Campaign:
    """Run a campaign and compare its end with the oracle."""
    with Campaign(directory, seed) as campaign:
        campaign.run(faults, report)
        campaign.verify()
    return campaign
