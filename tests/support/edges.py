"""Edges of a cluster on real NATS servers, in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from betrace.channels import ThreadRunner
from betrace.service.app.edge import Edge
from betrace.service.cluster.edge.tenants import TenantCopy
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.settings import Settings
from betrace.service.otlp.columns import SPAN_ID
from betrace.service.otlp.wire import scan_bodies
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, unpack
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate


def edge_settings(cluster: ClusterSettings, data: Path, **sections: Any) -> Settings:
    """Settings of an edge on free ports."""
    data.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "storage": {"path": data},
        "ingest": {"address": "127.0.0.1:0", "grpc_address": "127.0.0.1:0"},
        "shutdown": {"grace_seconds": 30},
        "cluster": cluster,
    }
    return Settings(**(given | sections))


@asynccontextmanager
async def running_edge(
    settings: Settings, *, die: bool = False
) -> AsyncIterator[tuple[Edge, str, str]]:
    """An edge with the URLs of its two listeners. It drains at the end, or dies."""
    assert settings.cluster is not None
    directory = TenantDirectory(settings.storage.path / "tenants.sqlite")

    async def exists(name: str) -> bool:
        return True

    gate = Gate(settings, directory, None, exists)
    client = await NatsClient.connect(settings.cluster, "edge")
    layout = Layout.of(settings.cluster)
    config = ConfigBucket(client, layout.config_bucket)
    feed, threads = TenantFeed(config), ThreadRunner("copy", 1)
    partitions = PartitionMap(config, layout.generations)
    edge = Edge(settings, client, layout, partitions, gate, feed)
    try:
        async with trio.open_nursery() as others:
            others.start_soon(feed.run)
            others.start_soon(partitions.run)
            await others.start(TenantCopy(gate, feed, threads).run)
            async with trio.open_nursery() as nursery:
                addresses = await nursery.start(edge.run)
                yield edge, f"{addresses.ingest}/v1/traces", addresses.grpc
                if die:
                    nursery.cancel_scope.cancel()
                else:
                    edge.stop()
            others.cancel_scope.cancel()
    finally:
        edge.close()
        threads.close()
        await client.close()
        gate.close()
        directory.close()


async def stored_spans(client: NatsClient, settings: ClusterSettings) -> Counter[tuple[str, int]]:
    """How often each span is in the partitions' logs, by tenant and span id."""
    streams = SpanStreams(client, Layout.of(settings))
    found: Counter[tuple[str, int]] = Counter()
    for partition in range(settings.partitions):
        after = 0
        with trio.fail_after(60):
            while after < await _last(streams, partition):
                for message in await streams.read(partition, after, 1 << 23, 1):
                    after = message.sequence
                    envelope = unpack(message.data)
                    for frame in envelope.frames if isinstance(envelope, Spans) else ():
                        batch = scan_bodies(frame.tenant, [frame.body])
                        assert len(batch) == frame.spans
                        found.update((frame.tenant, int(row[SPAN_ID])) for row in batch.spans)
    return found


async def _last(streams: SpanStreams, partition: int) -> int:
    while True:
        try:
            return await streams.last(partition)
        except NatsUnavailable:
            await trio.sleep(0.1)


async def post(
    client: httpx.Client, url: str, payload: bytes, tenant: str = "default", **headers: str
) -> httpx.Response:
    """Send a request, in a thread: httpx leaves generators behind when it fails within Trio."""
    given = {"content-type": "application/x-protobuf", "x-scope-orgid": tenant} | headers
    send = partial(client.post, url, content=payload, headers=given, timeout=60)
    return await trio.to_thread.run_sync(send, abandon_on_cancel=True)


async def post_until_accepted(client: httpx.Client, urls: list[str], payload: bytes) -> int:
    """Send a request, to one edge after the other, until one accepts it; returns the number of
    attempts."""
    attempts = 0
    with trio.fail_after(180):
        while True:
            attempts += 1
            try:
                response = await post(client, urls[attempts % len(urls)], payload)
            except httpx.TransportError:
                await trio.sleep(0.1)
                continue
            if response.status_code == 200:
                return attempts
            assert response.status_code == 503, response.text
            assert int(response.headers["retry-after"]) >= 1
            await trio.sleep(0.2)
