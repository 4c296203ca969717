"""Starts a change of the number of partitions. The owners of the partitions carry it out."""

from __future__ import annotations

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.generations import (
    FINISHED_PREFIX,
    PARTITIONS_KEY,
    Generations,
)
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.setup import (
    SetupError,
    create_streams,
    read_generations,
)


async def progress(client: NatsClient, settings: ClusterSettings) -> tuple[Generations, list[int]]:
    """The generations of partitions, and the partitions of former ones that are not finished.
    Raises :exc:`SetupError` without a cluster, and :exc:`NatsUnavailable`."""
    config = ConfigBucket(client, Layout.of(settings).config_bucket)
    found = await read_generations(config)
    if found is None:
        raise SetupError([f"there is no cluster {settings.prefix}; run: betrace cluster init"])
    generations, _ = found
    entries = await config.entries(FINISHED_PREFIX)
    finished = {int(entry.key.removeprefix(FINISHED_PREFIX)) for entry in entries}
    former = range(generations.current.first)
    return generations, [partition for partition in former if partition not in finished]


async def resize(client: NatsClient, settings: ClusterSettings, partitions: int) -> list[str]:
    """Divide spans among this many partitions from now on; returns what was done, which is nothing
    if there are that many already. May be interrupted at any point and called again. Raises
    :exc:`SetupError` if that is not possible, and :exc:`NatsUnavailable`."""
    generations, unfinished = await progress(client, settings)
    if generations.current.count == partitions:
        return []
    if unfinished:
        raise SetupError(
            [
                f"the change to {generations.current.count} partitions is not complete yet: "
                f"{len(unfinished)} former partitions are not finished"
            ]
        )
    try:
        grown = generations.grown(partitions)
    except ValueError as error:
        raise SetupError([str(error)]) from error
    done = await create_streams(client, Layout.of(settings, grown))
    config = ConfigBucket(client, Layout.of(settings).config_bucket)
    found = await read_generations(config)
    if found is None or found[0] != generations:
        raise SetupError(["another command resized the cluster at the same time"])
    try:
        await config.put(PARTITIONS_KEY, grown.to_json(), found[1])
    except Conflict as error:
        raise SetupError(["another command resized the cluster at the same time"]) from error
    return done
