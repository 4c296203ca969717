"""Which process sends to a destination, and where its progress is kept.

A single process sends to all destinations and keeps their progress in files. In a cluster one query
node at a time sends to a destination, and the progress is in a bucket that all of them read
(:mod:`betrace.service.cluster.query.sending`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from betrace.channels import ThreadRunner
from betrace.service.durable import write_atomically

_log = logging.getLogger("service.export")


class Progress(Protocol):
    """The progress of a destination in each queue. Raises :exc:`OSError` and
    :exc:`~betrace.channels.TransientError`."""

    async def load(self) -> dict[str, int] | None:
        """The number of the last signal that was exported, by queue; None for a new
        destination."""

    async def save(self, done: dict[str, int]) -> None:
        """Replace the progress durably."""


class Turns(Protocol):
    """Decides which process sends to each destination."""

    async def perform(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``, which sends to the destination ``name``, while it is this process's turn;
        it may be cancelled and begin again."""

    def progress(self, name: str) -> Progress:
        """The progress of a destination."""


class Alone:
    """One process that sends everything. The progress files are in ``directory``."""

    def __init__(self, directory: Path, threads: ThreadRunner) -> None:
        self._directory = directory
        self._threads = threads

    async def perform(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``."""
        await work()

    def progress(self, name: str) -> Progress:
        """The progress file of the destination."""
        return ProgressFile(self._directory / f"{name}.json", self._threads)


class ProgressFile:
    """A progress file, which is replaced after each delivery."""

    def __init__(self, path: Path, threads: ThreadRunner) -> None:
        self._path = path
        self._threads = threads

    async def load(self) -> dict[str, int] | None:
        """The content of the file; None if it is missing or damaged."""
        return await self._threads.run(self._read)

    async def save(self, done: dict[str, int]) -> None:
        """Replace the file."""
        await self._threads.run(self._write, done)

    def _read(self) -> dict[str, int] | None:
        try:
            return {str(k): int(v) for k, v in json.loads(self._path.read_text()).items()}
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, TypeError) as error:
            _log.error("%s is damaged (%s); the export starts with new signals", self._path, error)
        return None

    def _write(self, done: dict[str, int]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(done).encode())
