"""Processes of a cluster on loopback: real services with roles, on real NATS servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from betrace.service.config.cluster import ClusterSettings
from tests.support.nats_servers import connected
from tests.support.process import RULES, Running, started


class Node(Running):
    """A running process of a cluster."""

    def ready(self, listener: str) -> dict[str, Any]:
        """What ``/readyz`` says."""
        found: dict[str, Any] = httpx.get(f"{listener}/readyz", trust_env=False).json()
        return found

    def kill(self) -> None:
        """Kill it (SIGKILL)."""
        self.process.kill()
        self.process.wait()


class Cluster:
    """Starts processes of a cluster, each with a directory of its own below ``directory``."""

    def __init__(self, directory: Path, settings: ClusterSettings) -> None:
        self.directory = directory
        self.settings = settings

    def config(self, name: str) -> Path:
        """The node's config.toml, with the section [cluster]."""
        folder = self.directory / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.toml"
        cluster = self.settings
        path.write_text(
            "[cluster]\n"
            f'servers = "{cluster.servers}"\nprefix = "{cluster.prefix}"\nnode = "{name}"\n'
            f"partitions = {cluster.partitions}\nreplicas = {cluster.replicas}\n"
            f"lease_seconds = {cluster.lease_seconds}\n"
        )
        return path

    def rules(self, name: str, text: str = RULES) -> None:
        """Write the rules of the tenant `default` for a query node."""
        folder = self.directory / name / "rules"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "payments.yaml").write_text(text)

    def data(self, name: str) -> Path:
        """The node's data directory."""
        return self.directory / name / "data"

    def init(self) -> None:
        """Create the streams."""

        async def create() -> None:
            async with connected(self.settings):
                pass

        trio.run(create)

    @contextmanager
    def running(self, roles: str, name: str, *options: str, **settings: str) -> Iterator[Node]:
        """Run a process with some roles until the block ends; then kill it, if it still runs."""
        arguments = ["--role", roles, "--config", str(self.config(name))]
        arguments += ["--data", str(self.data(name))]
        if "query" in roles:
            if not (self.directory / name / "rules").exists():
                self.rules(name)
            arguments += ["--rules", str(self.directory / name / "rules")]
        with started([*arguments, *options], settings) as (process, urls, log):
            node = Node(process, urls)
            node.log = log
            yield node
