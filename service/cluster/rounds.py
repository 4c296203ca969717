"""Rounds: moments at which all partitions of a process do what can wait a little.

Most of what a small message costs is waking threads and writing to sockets. Tasks that wake up at
the same moment share that (:meth:`betrace.service.storage.jetstream.client.NatsClient.call`).
"""

from __future__ import annotations

import math

import trio


def round_after(now: float, seconds: float) -> float:
    """The first multiple of ``seconds`` after ``now``, on Trio's clock."""
    return (math.floor(now / seconds) + 1) * seconds if seconds > 0 else now


async def next_round(seconds: float) -> None:
    """Sleep until the next multiple of ``seconds``."""
    await trio.sleep_until(round_after(trio.current_time(), seconds))
