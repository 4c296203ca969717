"""The sample shop as a process of its own, its customers, and its rules."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import trio

from betrace.service.cli.common import Failure
from betrace.service.config.base import split_address

ANY_PORT = "127.0.0.1:0"
IDLE_SECONDS = 2.0  # longer than the shop's slowest span and its flush together


@dataclass(slots=True)
class Customer:
    """A trace that the shop sent, with the ids of the rules expected to break and found broken."""

    trace_id: str
    scenario: str
    expected: frozenset[str]
    found: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Whether exactly the expected rules raised a signal."""
        return self.found == self.expected

    def to_json(self) -> dict[str, Any]:
        """The fields, ``ok`` included."""
        return {
            "trace_id": self.trace_id,
            "scenario": self.scenario,
            "expected": sorted(self.expected),
            "found": sorted(self.found),
            "ok": self.ok,
        }


def free_address(address: str) -> str:
    """``address``, or any port if that one is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(split_address(address))
        except OSError:
            return ANY_PORT
    return address


def copy_rules(directory: Path) -> Path:
    """Write the sample rules into a new directory."""
    directory.mkdir(parents=True)
    for source in resources.files("betrace.service.cli.demo").joinpath("rules").iterdir():
        if source.name.endswith(".yaml"):
            (directory / source.name).write_bytes(source.read_bytes())
    return directory


async def run_shop(
    endpoint: str,
    record: Callable[[str, str], None],
    *options: str,
    task_status: trio.TaskStatus[trio.Process] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the shop to its end. ``record`` gets the trace id and the scenario of each customer.
    Starts with the process. Raises :exc:`Failure` if it fails."""
    command = [sys.executable, "-m", "betrace.service.cli.demo.shop"]
    command += ["--endpoint", endpoint, *options]
    async with trio.open_nursery() as nursery:
        # In a session of its own, so that Ctrl-C reaches only the demo.
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                command,
                stdout=subprocess.PIPE,
                check=False,
                env=clean_environment(),
                start_new_session=True,
            )
        )
        task_status.started(process)
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            sent = json.loads(line)
            record(sent["trace_id"], sent["scenario"])
    if process.returncode:
        raise Failure(
            f"the sample shop failed with exit code {process.returncode}; its output above says why"
        )


def clean_environment() -> dict[str, str]:
    """The environment without settings of OpenTelemetry and proxies."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return kept | {"NO_PROXY": "*"}


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
