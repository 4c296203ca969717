"""The state of the servers and streams of a cluster, for `betrace cluster status` and `doctor`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson
import trio

from betrace.service.config.base import split_address
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.nats import Nats, server_time_ns
from betrace.service.storage.jetstream.setup import stream_info

_ANSWER_SECONDS = 3.0
_MOST_BYTES = 1 << 20  # of what a server says about itself
_AT_ONCE = 8
_SURVEY_SECONDS = 120.0
_TRIES = 4
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server says to anyone who connects; ``error`` says why it did not answer."""

    address: str
    name: str = ""
    version: str = ""
    max_payload: int = 0
    jetstream: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A follower of a stream: ``lag`` messages are not stored there yet."""

    server: str
    current: bool
    offline: bool
    lag: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """A stream, as its leader describes it."""

    name: str
    leader: str
    """Empty if it has none, or if nobody answers for it."""
    followers: tuple[ReplicaState, ...]
    config: Mapping[str, Any]
    messages: int
    bytes: int
    last: int
    clock_difference: float
    """Seconds by which the leader's clock is ahead of this machine's, within the time that the
    answer took."""
    uncertainty: float
    exists: bool = True

    @property
    def replicas(self) -> int:
        """Servers that hold the whole stream."""
        return bool(self.leader) + sum(each.current for each in self.followers)


async def survey_servers(settings: ClusterSettings) -> list[ServerState]:
    """Ask each of ``cluster.servers``."""
    found: dict[str, ServerState] = {}

    async def ask(url: str) -> None:
        found[url] = await _ask(url)

    urls = settings.servers.split(",")
    async with trio.open_nursery() as nursery:
        for url in urls:
            nursery.start_soon(ask, url)
    return [found[url] for url in urls]


async def _ask(url: str) -> ServerState:
    """A NATS server introduces itself in a line of JSON, before TLS and authentication."""
    address = urlsplit(url).netloc
    host, port = split_address(address)
    line = b""
    try:
        with trio.fail_after(_ANSWER_SECONDS):
            async with await trio.open_tcp_stream(host, port) as stream:
                while b"\n" not in line and len(line) < _MOST_BYTES:
                    data = await stream.receive_some()
                    if not data:
                        break
                    line += data
        kind, _, text = line.partition(b" ")
        if kind != b"INFO":
            return ServerState(address, error="it does not speak NATS")
        info = orjson.loads(text.partition(b"\n")[0])
    except (OSError, trio.TooSlowError, orjson.JSONDecodeError) as error:
        return ServerState(address, error=f"it does not answer ({str(error) or 'timeout'})")
    return ServerState(
        address,
        str(info.get("server_name", "")),
        str(info.get("version", "")),
        int(info.get("max_payload", 0)),
        bool(info.get("jetstream", False)),
    )


async def survey_streams(client: NatsClient, layout: Layout) -> list[StreamState]:
    """Ask the leaders of all streams; again for a moment if a follower is behind, because under
    load one often is."""

    async def work(nats: Nats) -> list[StreamState]:
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str) -> StreamState:
            async with slots:
                state = await _stream_state(nats, name)
                for _ in range(_TRIES):
                    if state.replicas == state.config.get("num_replicas", state.replicas):
                        break
                    await asyncio.sleep(_RETRY_SECONDS)
                    state = await _stream_state(nats, name)
                return state

        return await asyncio.gather(*(one(each["name"]) for each in layout.streams()))

    return await client.call(work, _SURVEY_SECONDS)


async def _stream_state(nats: Nats, name: str) -> StreamState:
    before = time.time_ns()
    try:
        info = await stream_info(nats, name)
    except NatsUnavailable:
        return StreamState(name, "", (), {}, 0, 0, 0, 0.0, 0.0)
    after = time.time_ns()
    if info is None:
        return StreamState(name, "", (), {}, 0, 0, 0, 0.0, 0.0, exists=False)
    cluster = info.get("cluster") or {}
    middle = (before + after) // 2
    asked = server_time_ns(info["ts"]) if "ts" in info else middle
    state = info["state"]
    return StreamState(
        name,
        cluster.get("leader", ""),
        tuple(
            ReplicaState(
                each["name"],
                bool(each.get("current")),
                bool(each.get("offline")),
                int(each.get("lag", 0)),
            )
            for each in cluster.get("replicas") or ()
        ),
        info["config"],
        int(state["messages"]),
        int(state["bytes"]),
        int(state["last_seq"]),
        (asked - middle) / 1e9,
        (after - before) / 2e9,
    )
