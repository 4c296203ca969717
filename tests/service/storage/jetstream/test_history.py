"""Reading the whole log of a cluster, and copying it to a local log, on a real server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, Tick, pack
from betrace.service.storage.jetstream.history import SpanHistory
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.local_copy import LocalCopy
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.spans import S, body

SECOND = 1_000_000_000


@pytest.fixture
def spans(client: NatsClient, settings: ClusterSettings) -> SpanStreams:
    return SpanStreams(client, Layout.of(settings))


async def append(spans: SpanStreams, partition: int, number: int, *tenants: str) -> int:
    """Append a message with one span of each tenant; returns when."""
    now = time.time_ns()
    frames = [TenantFrame(each, now, 1, body(S(number))) for each in tenants]
    data = pack(Spans(frames)) if tenants else pack(Tick())
    await spans.append(partition, data, f"{partition}-{number}")
    return now


async def read(history: SpanHistory, ranges: Sequence[range]) -> list[tuple[int, int]]:
    found = [each async for part in history.rounds(ranges) for each in part]
    times = [message.time_ns for _, message in found]
    assert times == sorted(times)
    return [(partition, message.sequence) for partition, message in found]


async def test_messages_of_all_partitions_come_in_the_order_of_their_times(
    spans: SpanStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betrace.service.storage.jetstream.history._READ_BYTES", 1)
    history = SpanHistory(spans, 2)
    assert await history.begin_ns() is None
    assert await read(history, await history.ranges()) == []
    order = [0, 1, 1, 0, 0, 1, 0]
    times = [await append(spans, p, number, "acme") for number, p in enumerate(order)]
    sequences = [order[: k + 1].count(p) for k, p in enumerate(order)]
    expected = list(zip(order, sequences, strict=True))
    ranges = await history.ranges()
    await append(spans, 0, 99)  # after reading began
    assert await read(history, ranges) == expected
    begin = await history.begin_ns()
    assert begin is not None
    assert abs(begin - times[0]) < 60 * SECOND
    third = await spans.get(1, 2)
    assert third is not None
    ranges = await history.ranges(since_ns=third.time_ns, until_ns=third.time_ns + 1)
    assert await read(history, ranges) == [(1, 2)]
    ranges = await history.ranges(starts={0: 3, 1: 3})
    assert await read(history, ranges) == [(0, 3), (1, 3), (0, 4), (0, 5)]


async def test_deleted_messages_are_a_gap(spans: SpanStreams) -> None:
    for number in range(4):
        await append(spans, 0, number, "acme")
    history = SpanHistory(spans, 2)
    ranges = await history.ranges()
    await spans.forget_before(0, 3)
    assert await read(history, ranges) == [(0, 3), (0, 4)]
    assert len(history.gaps) == 1
    await spans.forget_before(0, 5)
    assert await read(SpanHistory(spans, 2), ranges) == []


async def test_spans_are_copied_to_a_local_log(spans: SpanStreams, tmp_path: Path) -> None:
    await append(spans, 0, 1, "acme", "beta")
    await spans.append(0, b"damaged", "damaged")
    await append(spans, 1, 2, "acme")
    after = time.time_ns() + 1
    history = SpanHistory(spans, 2)
    reported: list[int] = []
    with SpanLog(tmp_path) as log:
        copy = LocalCopy(log, lambda name: name)
        await copy.run(history, await history.ranges(), report=reported.append)
        assert (log.tenants(), copy.spans, reported[-1]) == (["acme", "beta"], 3, 3)
        assert len(copy.damaged) == 1
        positions, frames = zip(*log.frames("acme"), strict=True)
        batch = read_frames("acme", list(positions), list(frames), 1 << 20)
        assert len(batch) == 2
        for wanted, received in ((0, (after, None)), (0, (None, 1)), (2, (1, after))):
            copy = LocalCopy(log, lambda name: name if name == "acme" else None)
            await copy.run(history, await history.ranges(), received)
            assert copy.spans == wanted
        await trio.lowlevel.checkpoint()
