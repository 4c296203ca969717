"""The real service in a process that is killed and started again on the same data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from betrace.service.cli.demo.ports import free_port
from tests.support.process import environment

START_SECONDS = 600  # kernels may have to be compiled, on a busy machine
STOP_SECONDS = 60

SETTINGS = {
    "traces__idle_seconds": "1",
    "traces__sweep_seconds": "1",
    "checkpoint__interval_seconds": "0.4",
    "checkpoint__max_interval_seconds": "0.4",
    "caches__trace_metadata": "200",
    "caches__trace_metadata_ttl_seconds": "3",
    "log__segment_bytes": str(1 << 20),
    "rules__poll_seconds": "600",
    "redelivery__transient_retry_seconds": "1",
    "redelivery__delay_seconds": "0.1",
    "breakers__storage__timeout_seconds": "2",
    "breakers__storage__open_seconds": "2",
    "breakers__storage__slow_call_seconds": "2",
}


class ServiceProcess:
    """The service on fixed ports, started and stopped in any way. Its log is in ``service.log``
    below ``directory``. ``entry`` is the Python command that runs it."""

    def __init__(
        self, directory: Path, entry: tuple[str, ...] = ("-m", "betrace.service"), **settings: str
    ):
        self.directory = directory
        self.data = directory / "data"
        self.log_path = directory / "service.log"
        self.address = f"127.0.0.1:{free_port()}"
        self.api = f"127.0.0.1:{free_port()}"
        self.settings = SETTINGS | settings
        self.entry = entry
        self.process: subprocess.Popen[str] | None = None
        self.ready = threading.Event()

    def arguments(self) -> list[str]:
        """What follows ``serve --json``."""
        found = ["--data", str(self.data), "--metrics", "off"]
        return [*found, "--ingest", self.address, "--grpc", "off", "--api", self.api]

    def start(self) -> None:
        """Start the process; ``ready`` is set when it prints its addresses."""
        self.ready.clear()
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("a") as log:
            log.write("---- start\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, *self.entry, "serve", "--json", *self.arguments()],
                env=environment(**self.settings),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._await_ready, args=(self.process,), daemon=True).start()

    def _await_ready(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            if process.stdout.readline() and process is self.process:
                self.ready.set()
            process.stdout.read()

    def wait_ready(self) -> None:
        """Return when the service is ready; fail if it exits first."""
        end = time.monotonic() + START_SECONDS
        while not self.ready.wait(0.02):
            assert self.process is not None
            code = self.process.poll()
            assert code is None, (
                f"the service exited with {code} during the start:\n{self.log()[-3000:]}"
            )
            assert time.monotonic() < end, "the service did not become ready"

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        assert self.process is not None
        self.ready.clear()
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """Send SIGTERM without waiting."""
        assert self.process is not None
        self.ready.clear()
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.terminate()
        assert self.process is not None
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            raise

    def close(self) -> None:
        """Kill the process if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def log(self) -> str:
        """Return its log so far."""
        return self.log_path.read_text()

    def get(self, path: str, tenant: str | None = None) -> Any:
        """Return the JSON answer of the API."""
        headers = {"x-scope-orgid": tenant} if tenant else {}
        url = f"http://{self.api}{path}"
        response = httpx.get(url, headers=headers, timeout=20, trust_env=False)
        assert response.status_code == 200, response.text
        return json.loads(response.text)


class Victim(ServiceProcess):
    """The service with all of its roles in one process, with ``data`` and ``rules`` below
    ``directory``."""

    def arguments(self) -> list[str]:
        return [*super().arguments(), "--rules", str(self.directory / "rules")]
