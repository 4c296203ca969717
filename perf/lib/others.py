"""The servers that BeTrace is compared with, each in a process: Rotel and bare HTTP."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from betrace.service.cli.demo.ports import free_ports
from perf.lib.target import cpu_seconds
from perf.report.output import ROOT

START_SECONDS = 30
STOP_SECONDS = 10


class Other:
    """A running server, and the CPU that it used."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._usage = psutil.Process(process.pid)

    def cpu_seconds(self) -> float:
        """CPU used since the start by the process and its children, in user and system mode."""
        return cpu_seconds(self._usage)

    def rss(self) -> int:
        """Resident memory in bytes."""
        return int(self._usage.memory_info().rss)


@contextmanager
def rotel() -> Iterator[Other]:
    """Rotel on a free port; it decodes the spans and drops them."""
    found = importlib.util.find_spec("rotel")
    if found is None or found.origin is None:
        raise RuntimeError("Rotel is not installed: run make setup")
    agent = Path(found.origin).with_name("rotel-agent")
    port, unused = free_ports(2)
    command = [str(agent), "start", "--exporter", "blackhole"]
    command += ["--otlp-http-endpoint", f"127.0.0.1:{port}"]
    command += ["--otlp-grpc-endpoint", f"127.0.0.1:{unused}"]
    with _server(command, port) as running:
        yield running


@contextmanager
def bare_http() -> Iterator[Other]:
    """:mod:`perf.lib.bare_http` on a free port."""
    if importlib.util.find_spec("uvicorn") is None:
        raise RuntimeError("uvicorn is not installed: run make setup")
    (port,) = free_ports(1)
    with _server([sys.executable, "-m", "perf.lib.bare_http", str(port)], port) as running:
        yield running


@contextmanager
def _server(command: Sequence[str], port: int) -> Iterator[Other]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ROTEL_", "OTEL_"))}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read()}")
                time.sleep(0.05)
            yield Other(process, port)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
