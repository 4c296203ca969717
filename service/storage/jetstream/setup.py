"""Creates and checks the streams, buckets and object store of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import (
    JetStreamError,
    NatsUnavailable,
    NotInStream,
)
from betrace.service.storage.jetstream.generations import PARTITIONS_KEY, Generations
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.nats import Nats

T = TypeVar("T")

SETUP_SECONDS = 300.0

PATIENCE_SECONDS = 30.0
"""How long servers that have just started may take to answer."""

_CHANGE_SECONDS = 30.0
_RETRY_SECONDS = 0.25
_AT_ONCE = 4
_CHANGEABLE = ("num_replicas", "max_bytes")
_CHECKED = (
    "subjects",
    "retention",
    "storage",
    "num_replicas",
    "discard",
    "max_bytes",
    "max_msgs",
    "max_age",
    "duplicate_window",
    "allow_direct",
)


class SetupError(Exception):
    """The streams in NATS are not as this program needs them. ``problems`` has a sentence for each
    difference."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


async def set_up(client: NatsClient, settings: ClusterSettings) -> list[str]:
    """Create what is missing, and adapt replicas and sizes; returns what was done. Idempotent.
    Raises :exc:`SetupError` for differences that cannot be changed, and
    :exc:`NatsUnavailable`."""
    layout = Layout.of(settings)
    done: list[str] = []
    name = f"KV_{layout.config_bucket}"
    (bucket,) = (stream for stream in layout.streams() if stream["name"] == name)
    done += await client.call(lambda nats: _ensure_all(nats, [bucket]), SETUP_SECONDS)
    config = ConfigBucket(client, layout.config_bucket)
    generations = await _fix_partitions(config, layout.generations)
    if generations.current.count != settings.partitions:
        done.append(other_number(generations, settings))
    done += await create_streams(client, Layout.of(settings, generations))
    return done


async def create_streams(client: NatsClient, layout: Layout) -> list[str]:
    """Create the streams of a layout that are missing, and adapt the others; returns what was done.
    Idempotent. Raises :exc:`SetupError` and :exc:`NatsUnavailable`."""
    streams = layout.streams()
    return await client.call(lambda nats: _ensure_all(nats, streams), SETUP_SECONDS)


async def _fix_partitions(config: ConfigBucket, wanted: Generations) -> Generations:
    """The cluster's partitions: those that are wanted, if it is new."""
    end = trio.current_time() + PATIENCE_SECONDS
    while True:
        try:
            await config.put(PARTITIONS_KEY, wanted.to_json(), 0)
            return wanted
        except Conflict:
            pass
        except NatsUnavailable:
            if trio.current_time() > end:
                raise
            await trio.sleep(_RETRY_SECONDS)
            continue
        found = await read_generations(config)
        if found is not None:
            return found[0]


async def read_generations(config: ConfigBucket) -> tuple[Generations, int] | None:
    """The cluster's generations of partitions, and their revision; None if the cluster does not
    exist. Raises :exc:`NatsUnavailable`."""
    entry = await config.get(PARTITIONS_KEY)
    if entry is None or entry.value is None:
        return None
    return Generations.from_json(entry.value), entry.revision


async def generations_of(config: ConfigBucket, settings: ClusterSettings) -> Generations:
    """The cluster's generations of partitions; of one that does not exist yet, those that it would
    have. Raises :exc:`NatsUnavailable`."""
    found = await read_generations(config)
    return Generations.of(settings.partitions) if found is None else found[0]


def other_number(generations: Generations, settings: ClusterSettings) -> str:
    """Says that the number of partitions in the configuration does not count."""
    return (
        f"the cluster {settings.prefix} has {generations.current.count} partitions; "
        f"cluster.partitions = {settings.partitions} in the configuration is ignored"
    )


async def check(client: NatsClient, settings: ClusterSettings) -> Generations:
    """Raise :exc:`SetupError` unless all streams exist and are as they should be. Returns the
    cluster's generations of partitions, which count, whatever the settings say."""
    config = ConfigBucket(client, Layout.of(settings).config_bucket)
    generations = await _generations(client, config, settings)
    layout = Layout.of(settings, generations)

    async def work(nats: Nats) -> list[str]:
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(wanted: Mapping[str, Any]) -> list[str]:
            async with slots:
                found = await _patiently(lambda: stream_info(nats, wanted["name"]))
            if found is None:
                return [f"{wanted['name']} does not exist; run: betrace cluster init"]
            return _differences(found["config"], wanted)

        problems = await asyncio.gather(*map(one, layout.streams()))
        return [problem for each in problems for problem in each]

    if problems := await client.call(work, SETUP_SECONDS):
        raise SetupError(problems)
    return generations


async def _generations(
    client: NatsClient, config: ConfigBucket, settings: ClusterSettings
) -> Generations:
    name = f"KV_{Layout.of(settings).config_bucket}"
    if await client.call(lambda nats: _patiently(lambda: stream_info(nats, name))) is None:
        raise SetupError([f"{name} does not exist; run: betrace cluster init"])
    found = await read_generations(config)
    if found is None:
        problem = f"the cluster {settings.prefix} is not complete; run: betrace cluster init"
        raise SetupError([problem])
    return found[0]


async def stream_info(nats: Nats, name: str) -> dict[str, Any] | None:
    """The leader's description of a stream; None if it does not exist. Raises
    :exc:`NatsUnavailable`."""
    try:
        return await nats.api(f"STREAM.INFO.{name}")
    except NotInStream:
        return None


async def _patiently(work: Callable[[], Awaitable[T]]) -> T:
    """The result; tried again for a while if the servers are not ready."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE_SECONDS
    while True:
        try:
            return await work()
        except NatsUnavailable:
            if loop.time() > end:
                raise
            await asyncio.sleep(_RETRY_SECONDS)


async def _ensure_all(nats: Nats, streams: list[dict[str, Any]]) -> list[str]:
    slots = asyncio.Semaphore(_AT_ONCE)
    problems: list[str] = []

    async def one(wanted: dict[str, Any]) -> list[str]:
        async with slots:
            try:
                return await _ensure(nats, wanted)
            except SetupError as error:
                problems.extend(error.problems)
                return []

    async with asyncio.TaskGroup() as tasks:
        done = [tasks.create_task(one(wanted)) for wanted in streams]
    if problems:
        raise SetupError(problems)
    return [line for task in done for line in task.result()]


async def _ensure(nats: Nats, wanted: dict[str, Any]) -> list[str]:
    name = wanted["name"]
    done: list[str] = []

    async def attempt() -> dict[str, Any]:
        found = await stream_info(nats, name)
        if found is None:
            done[:] = [f"created {name}"]  # even if the reply is lost
            await nats.api(f"STREAM.CREATE.{name}", wanted, _CHANGE_SECONDS)
            return wanted
        config: dict[str, Any] = found["config"]
        changes = {key: wanted[key] for key in _CHANGEABLE if config.get(key) != wanted[key]}
        if changes:
            done[:] = [f"changed {name}: {key} = {value}" for key, value in changes.items()]
            await nats.api(f"STREAM.UPDATE.{name}", config | changes, _CHANGE_SECONDS)
        return config | changes

    try:
        config = await _patiently(attempt)
    except JetStreamError as error:
        raise SetupError([f"{name} cannot be created or changed: {error}"]) from error
    if problems := _differences(config, wanted):
        raise SetupError(problems)
    return done


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{wanted['name']} has {key} = {found.get(key)} instead of {wanted[key]}; "
        + (
            "run: betrace cluster init"
            if key in _CHANGEABLE
            else "change it with the nats program, or use another cluster.prefix"
        )
        for key in _CHECKED
        if found.get(key) != wanted[key]
    ]
