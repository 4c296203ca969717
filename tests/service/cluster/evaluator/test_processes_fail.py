"""Evaluators as processes: killed, frozen with SIGSTOP, drained and stopped under load."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import trio

from tests.support.cluster_load import WAIT, Load
from tests.support.cluster_processes import Cluster, Node
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers
from tests.support.process import command, environment

pytestmark = pytest.mark.slow

PARTITIONS = 4
_prefixes = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers


class Evaluators(Load):
    """A load, and evaluators as processes."""

    def __init__(self, server: NatsServers, directory: Path, stack: ExitStack) -> None:
        super().__init__(server.settings(prefix=f"fail{next(_prefixes)}", partitions=PARTITIONS))
        self.processes = Cluster(directory, self.settings)
        self.stack = stack
        self.nodes: dict[str, Node] = {}

    async def start(self, *names: str) -> None:
        """Start evaluators at the same time."""

        async def start(name: str) -> None:
            running = self.processes.running("evaluator", name, checkpoint__interval_seconds="2")
            self.nodes[name] = await trio.to_thread.run_sync(self.stack.enter_context, running)

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(start, name)

    def metrics(self, name: str, metric: str) -> dict[int, float]:
        """A metric of a node, by partition."""
        text = httpx.get(f"{self.nodes[name].metrics}/metrics", trust_env=False).text
        found = re.findall(rf'^{metric}{{partition="(\d+)"}} (\S+)$', text, re.MULTILINE)
        return {int(partition): float(value) for partition, value in found}

    async def current(self, *names: str) -> dict[str, list[int]]:
        """Wait until these nodes have all partitions and are current; who has which."""
        with trio.fail_after(WAIT):
            while True:
                found = {}
                for name in names:
                    values = await trio.to_thread.run_sync(
                        self.metrics, name, "betrace_partition_current"
                    )
                    found[name] = [p for p, value in values.items() if value]
                owned = sorted(p for some in found.values() for p in some)
                if owned == list(self.partitions) and all(found.values()):
                    return found
                await trio.sleep(0.05)

    def signal(self, name: str, number: int) -> None:
        os.kill(self.nodes[name].process.pid, number)

    async def drain(self, name: str) -> subprocess.CompletedProcess[str]:
        return await trio.to_thread.run_sync(self._drain, name)

    def _drain(self, name: str) -> subprocess.CompletedProcess[str]:
        config = str(self.processes.config("operator"))
        return subprocess.run(
            command("cluster", "drain", name, "--config", config),
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT,
        )


async def test_evaluators_are_killed_frozen_and_drained(server, tmp_path):
    with ExitStack() as stack:
        cluster = Evaluators(server, tmp_path, stack)
        await cluster.open()
        stack.callback(cluster.client.stop)
        await cluster.start("one", "two", "three")
        await cluster.current("one", "two", "three")
        await cluster.rules_are_known()
        sent = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.send_until, sent)
            await trio.sleep(2)
            cluster.nodes["one"].kill()
            await cluster.current("two", "three")

            cluster.signal("two", signal.SIGSTOP)
            await cluster.current("three")
            await trio.sleep(3 * cluster.settings.lease_seconds)
            cluster.signal("two", signal.SIGCONT)
            await cluster.current("two", "three")

            done = await cluster.drain("three")
            assert done.returncode == 0, done.stdout + done.stderr
            assert done.stdout.endswith("three has 0 partitions\n")
            await cluster.current("two")
            await trio.sleep(1)
            sent.set()
        await cluster.check()
