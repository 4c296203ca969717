"""Processes of a cluster on loopback: real services with roles, on real NATS servers."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.setup import set_up
from tests.support.process import RULES, START_SECONDS, Running, command, environment


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
            client = await NatsClient.connect(self.settings, "init")
            try:
                await set_up(client, self.settings)
            finally:
                await client.close()

        trio.run(create)

    @contextmanager
    def running(self, roles: str, name: str, *options: str, **settings: str) -> Iterator[Node]:
        """Run a process with some roles until the block ends; then kill it, if it still runs."""
        arguments = ["serve", "--json", "--role", roles, "--config", str(self.config(name))]
        arguments += ["--data", str(self.data(name))]
        if "query" in roles:
            if not (self.directory / name / "rules").exists():
                self.rules(name)
            arguments += ["--rules", str(self.directory / name / "rules")]
        for listener in ("ingest", "grpc", "api", "metrics"):
            arguments += [f"--{listener}", "127.0.0.1:0"]
        process = subprocess.Popen(
            command(*arguments, *options),
            env=environment(**{"traces__idle_seconds": "1"} | settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        log: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        reader = threading.Thread(target=log.extend, args=(process.stderr,))
        watchdog = threading.Timer(START_SECONDS, process.kill)
        reader.start()
        watchdog.start()
        try:
            first = process.stdout.readline()
            watchdog.cancel()
            assert first, f"{name} did not start:\n" + "".join(log)
            node = Node(process, json.loads(first))
            node.log = log
            yield node
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join()
            process.stdout.close()
            process.stderr.close()
