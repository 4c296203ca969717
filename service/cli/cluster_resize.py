"""What `betrace cluster resize` does: it changes the number of partitions, and shows progress."""

from __future__ import annotations

from collections.abc import Callable

import trio

from betrace.channels import TransientError
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream import resize
from betrace.service.storage.jetstream.client import NatsClient

_LOOK_SECONDS = 0.2
_RETRY_SECONDS = 1.0


async def resize_cluster(
    client: NatsClient,
    settings: ClusterSettings,
    partitions: int,
    seconds: float,
    report: Callable[[str], None],
) -> list[int]:
    """Change the number of partitions, and wait up to ``seconds`` until the former ones are
    finished; returns those that are not. ``report`` is called with what happens."""
    done = await resize.resize(client, settings, partitions)
    if done:
        report(f"created {len(done)} streams")
    end = trio.current_time() + seconds
    generations, left = await resize.progress(client, settings)
    former = generations.current.first
    while True:
        report(f"{former - len(left)} of {former} former partitions are finished")
        now = left
        while now == left:
            if not left or trio.current_time() >= end:
                return left
            await trio.sleep(_LOOK_SECONDS)
            try:
                _, now = await resize.progress(client, settings)
            except TransientError as error:
                report(f"the progress cannot be read now: {error}")
                await trio.sleep(_RETRY_SECONDS)
        left = now
