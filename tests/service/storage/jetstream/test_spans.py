"""The span log in JetStream, on a real server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from outcome import Error, Outcome

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream import spans
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import LogGap, MessageTooLarge, NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.nats import Nats, NewMessage
from betrace.service.storage.jetstream.spans import Append, SpanStreams
from betrace.service.storage.jetstream.stream_log import Retries

MB = 1 << 20


@pytest.fixture
def log(client: NatsClient, settings: ClusterSettings) -> SpanStreams:
    return SpanStreams(client, Layout.of(settings))


async def test_messages_come_back_in_order(log: SpanStreams) -> None:
    assert await log.last(0) == 0
    assert [await log.append(0, b"%d" % k, f"a{k}") for k in range(5)] == [1, 2, 3, 4, 5]
    assert await log.append(1, b"other", "b") == 1
    messages = await log.read(0, 0, MB, 0)
    assert [(each.sequence, each.data) for each in messages] == [
        (k + 1, b"%d" % k) for k in range(5)
    ]
    assert [each.sequence for each in await log.read(0, 3, MB, 0)] == [4, 5]
    times = [each.time_ns for each in messages]
    assert times == sorted(times)
    assert await log.last(0) == 5
    found = await log.get(0, 2)
    assert found is not None
    assert found.data == b"1"
    assert await log.get(0, 6) is None


async def test_a_repeated_id_is_stored_once(log: SpanStreams) -> None:
    assert await log.append(0, b"x", "same") == 1
    assert await log.append(0, b"y", "next") == 2
    assert await log.append(0, b"x", "same") == 1
    assert await log.last(0) == 2


async def append_each(log: SpanStreams, *appends: Append) -> list[int | type[BaseException]]:
    found: dict[int, int | type[BaseException]] = {}

    def done(number: int, result: Outcome[int]) -> None:
        assert number not in found
        found[number] = type(result.error) if isinstance(result, Error) else result.unwrap()

    await log.append_each(appends, done)
    return [found[number] for number in range(len(appends))]


async def test_messages_of_several_partitions_are_appended_together(
    log: SpanStreams, client: NatsClient
) -> None:
    for round in range(3):  # in the first one, nothing is known about the partitions
        more = [Append(p, b"%d" % round, f"{round}-{p}") for p in range(2)]
        assert await append_each(log, *more) == [round + 1] * 2
    again = Append(0, b"x", "2-0"), Append(1, b"next", "n")
    assert await append_each(log, *again) == [3, 4]
    assert [each.data for each in await log.read(1, 0, MB, 0)] == [b"0", b"1", b"2", b"next"]
    large = Append(1, bytes(client.max_payload + 1), "large"), Append(0, b"y", "y")
    assert await append_each(log, *large) == [MessageTooLarge, 4]
    assert await append_each(log) == []


async def test_messages_without_acknowledgement_are_published_again(
    log: SpanStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append_each(log, *(Append(p, b"0", f"{p}") for p in range(2)))
    monkeypatch.setattr(spans, "ATTEMPT_SECONDS", 0.2)
    publish = Nats.publish_each

    async def lossy(nats: Nats, messages: Sequence[NewMessage], ended: Any, seconds: float) -> None:
        def lost(number: int, sequence: int | None) -> None:
            ended(number, None if number else sequence)

        await publish(nats, messages, lost, seconds)
        await log._append(nats, Append(1, b"in between", "between"))  # known grows

    monkeypatch.setattr(Nats, "publish_each", lossy)
    assert await append_each(log, *(Append(p, b"1", f"{p}-1") for p in range(2))) == [2, 2]
    assert [each.data for each in await log.read(1, 0, MB, 0)] == [b"0", b"1", b"in between"]


async def test_no_result_comes_after_a_cancellation(
    log: SpanStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append(0, b"0", "first")
    found: list[int] = []

    async def silent(nats: Nats, messages: Any, ended: Any, seconds: float) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(Nats, "publish_each", silent)
    with trio.move_on_after(0.1):
        await log.append_each([Append(0, b"1", "a")], lambda number, _: found.append(number))
    await trio.sleep(0.1)
    assert found == []


async def test_reads_stop_at_the_message_that_reaches_the_bound(log: SpanStreams) -> None:
    for k in range(4):
        await log.append(0, os.urandom(50_000), f"a{k}")
    assert [each.sequence for each in await log.read(0, 0, 90_000, 0)] == [1, 2]
    assert [each.sequence for each in await log.read(0, 2, 10, 0)] == [3]


async def test_a_reader_waits_for_the_next_message(log: SpanStreams) -> None:
    assert await log.read(0, 0, MB, 0.05) == []
    found: list[int] = []

    async def read() -> None:
        found.extend(each.sequence for each in await log.read(0, 0, MB, 60))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(0.1)
        await log.append(0, b"x", "a")
    assert found == [1]


async def test_deleted_messages_are_a_gap(log: SpanStreams) -> None:
    for k in range(5):
        await log.append(0, b"x", f"a{k}")
    await log.forget_before(0, 4)
    assert await log.first(0) == 4
    assert [each.sequence for each in await log.read(0, 3, MB, 0)] == [4, 5]
    with pytest.raises(LogGap) as caught:
        await log.read(0, 1, MB, 0)
    assert (caught.value.expected, caught.value.found) == (2, 4)
    await log.forget_before(0, 2)
    assert await log.first(0) == 4


async def test_a_lost_message_in_the_middle_is_a_gap(
    log: SpanStreams, client: NatsClient, settings: ClusterSettings
) -> None:
    for k in range(5):
        await log.append(0, b"x", f"a{k}")
    stream = Layout.of(settings).spans_stream(0)
    await client.call(lambda nats: nats.api(f"STREAM.MSG.DELETE.{stream}", {"seq": 3}))
    with pytest.raises(LogGap, match="continues at 4 instead of 3"):
        await log.read(0, 0, MB, 0)


async def test_a_message_that_is_too_large_is_refused(log: SpanStreams, client: NatsClient) -> None:
    with pytest.raises(MessageTooLarge, match="max_payload"):
        await log.append(0, bytes(client.max_payload + 1), "a")
    assert await log.append(0, b"x", "b") == 1


@pytest.mark.parametrize("others", [0, 3])
async def test_an_id_that_servers_have_forgotten_is_searched_for(
    log: SpanStreams, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """As after an outage that lasted longer than servers remember ids."""
    for k in range(5):
        await log.append(0, b"x", f"a{k}")
    publish, sent = Nats.publish, []

    async def lossy(
        nats: Nats, subject: str, data: bytes, headers: dict[str, str], seconds: float
    ) -> int:
        sent.append(headers["Nats-Msg-Id"])
        for k in range(others):  # of other edges
            await publish(nats, subject, b"y", {"Nats-Msg-Id": f"other{k}"}, seconds)
        await publish(nats, subject, data, headers, seconds)
        raise NatsUnavailable("the reply was lost")

    monkeypatch.setattr(Nats, "publish", lossy)
    monkeypatch.setattr(Retries, "ids_forgotten", True)
    assert await log.append(0, b"lost", "lost") == 6 + others
    assert sent == ["lost"]


async def test_an_id_that_is_not_found_is_sent_again(
    log: SpanStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, sent = Nats.publish, []

    async def lossy(
        nats: Nats, subject: str, data: bytes, headers: dict[str, str], seconds: float
    ) -> int:
        sent.append(headers["Nats-Msg-Id"])
        if len(sent) == 1:
            raise NatsUnavailable("lost on its way")
        return await publish(nats, subject, data, headers, seconds)

    monkeypatch.setattr(Nats, "publish", lossy)
    monkeypatch.setattr(Retries, "ids_forgotten", True)
    assert await log.append(0, b"x", "a") == 1
    assert sent == ["a", "a"]


async def test_wakeups_that_nobody_waits_for_end(
    log: SpanStreams, client: NatsClient, settings: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Layout.of(settings).spans_wakeup

    async def subscriptions(nats: Nats) -> int:
        return sum(each.subject == subject for each in nats.nc._subs.values())

    assert await log.read(0, 0, MB, 0.01) == []
    assert await client.call(subscriptions) == 1
    monkeypatch.setattr("betrace.service.storage.jetstream.wakeups._UNUSED_SECONDS", 0.0)
    await log.append(0, b"x", "a")
    with trio.fail_after(60):
        while await client.call(subscriptions):
            await trio.sleep(0.01)
    monkeypatch.undo()
    assert [each.sequence for each in await log.read(0, 0, MB, 1)] == [1]
    assert await log.read(0, 1, MB, 0.01) == []
    assert await client.call(subscriptions) == 1
