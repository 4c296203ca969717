"""Appends a partition's output, one append at a time.

While an append is in flight the partition goes on, and what it decides meanwhile is appended
together. One append at a time keeps the fence safe: with several, those of a former owner can slip
in behind the epoch of its successor (docs/decisions/0036-leases-and-fences.md).
"""

from __future__ import annotations

import logging

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster import output
from betrace.service.cluster.output import Output
from betrace.service.cluster.rounds import round_after
from betrace.service.storage.jetstream.errors import StreamFull
from betrace.service.storage.jetstream.fenced import FencedLog

_log = logging.getLogger("service.cluster.output")

MOST_WAITING_ROWS = 20_000
SOON_ROWS = 2_000
"""This many rows are appended as soon as possible even if no signal is among them."""
INLINE_ROWS = 50
"""At most this many rows are packed on Trio's thread, in about 0.2 ms."""

HEARTBEAT_SECONDS = 1.0
_RETRY_SECONDS = 1.0


class OutputWriter:
    """Writes outputs in order. Use one per epoch.

    Args:
      log: the output, with an epoch of this node.
      threads: packs the messages.
      sequence: of the log's last message, the epoch.
    """

    def __init__(self, log: FencedLog, threads: ThreadRunner, sequence: int) -> None:
        self._log = log
        self._threads = threads
        self._waiting: Output | None = None
        self._in_flight = False
        self._wake = trio.Event()
        self._stored = trio.Event()
        self.first_step = 0
        """What is older than this step is stored, so its replay adds nothing; whatever else a
        replay finds waits until then, so that the steps in the output do not go backwards."""
        self.sequence = sequence
        """The sequence of the last message in the output."""
        self.upto = 0
        """The sequence of the partition's log up to which results are stored."""
        self.step = 0
        """The last step whose results are stored."""

    def add(self, found: Output) -> None:
        """Append an output: one with signals as soon as possible, any other within a second. What
        has only closed traces waits for more of them, and what has nothing tells readers how far
        the partition is."""
        if self._waiting is None:
            self._waiting = found
        else:
            self._waiting.add(found)
        waiting = self._waiting
        signals = any(each.signals for each in waiting.decided)
        if signals or waiting.dead or waiting.undecided or waiting.rows >= SOON_ROWS:
            self._wake.set()

    async def room(self) -> None:
        """Wait until the backlog of results is small enough."""
        while self._has_new and self._waiting and self._waiting.rows > MOST_WAITING_ROWS:
            await self._stored.wait()

    async def settled(self) -> None:
        """Append everything that waits, and wait until it is stored."""
        while self._in_flight or self._has_new:
            self._wake.set()
            await self._stored.wait()

    async def wait_stored(self, step: int) -> None:
        """Wait until the results of a step, which were added, are stored."""
        while self.step < step and (self._in_flight or self._has_new):
            self._wake.set()
            await self._stored.wait()

    @property
    def _has_new(self) -> bool:
        return self._waiting is not None and self._waiting.step >= self.first_step

    async def run(self) -> None:
        """Append until cancelled. Raises :exc:`Fenced` when another owner has taken over."""
        while True:
            with trio.move_on_at(round_after(trio.current_time(), HEARTBEAT_SECONDS)):
                await self._wake.wait()
            self._wake = trio.Event()
            if self._waiting is None or not self._has_new:
                continue
            found, self._waiting = self._waiting, None
            self._in_flight = True
            for message in await self._pack(found):
                await self._append(message)
            self.upto, self.step = found.upto, found.step
            self._in_flight = False
            self._stored.set()
            self._stored = trio.Event()

    async def _pack(self, found: Output) -> list[bytes]:
        if found.rows <= INLINE_ROWS:
            return output.pack(found)
        return await self._threads.run(output.pack, found)

    async def _append(self, message: bytes) -> None:
        while True:
            try:
                self.sequence = await self._log.append(message)
                return
            except StreamFull as error:
                _log.warning("results cannot be stored; trying again: %s", error)
                await trio.sleep(_RETRY_SECONDS)
