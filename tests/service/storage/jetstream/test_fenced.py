"""One writer at a time, on a real server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import MessageTooLarge, NatsUnavailable
from betrace.service.storage.jetstream.fenced import Epoch, Fenced, FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.nats import Nats

MB = 1 << 20


@pytest.fixture
def logs(client: NatsClient, settings: ClusterSettings) -> list[FencedLog]:
    """The same output, as three processes see it."""
    return [FencedLog(client, Layout.of(settings), 0) for _ in range(3)]


async def contents(log: FencedLog) -> list[tuple[int, int, bytes]]:
    return [(each.sequence, each.epoch, each.data) for each in await log.read(0, None, MB, 0)]


async def test_an_owner_appends_after_opening_an_epoch(logs: list[FencedLog]) -> None:
    with pytest.raises(Fenced, match="no epoch is open"):
        await logs[0].append(b"x")
    assert await logs[0].epoch() is None
    assert await logs[0].open("ann") == Epoch(1, 1, "ann")
    assert [await logs[0].append(b"a"), await logs[0].append(b"b")] == [2, 3]
    assert await contents(logs[1]) == [(1, 1, b""), (2, 0, b"a"), (3, 0, b"b")]
    assert await logs[0].last() == 3
    assert await logs[1].epoch() == Epoch(1, 1, "ann")


async def test_a_former_owner_can_never_append_again(logs: list[FencedLog]) -> None:
    await logs[0].open("ann")
    await logs[0].append(b"a")
    assert await logs[1].open("bob") == Epoch(2, 3, "bob")
    for _ in range(2):
        with pytest.raises(Fenced):
            await logs[0].append(b"late")
    assert await logs[1].append(b"b") == 4
    with pytest.raises(Fenced):
        await logs[0].append(b"late")
    assert await contents(logs[2]) == [(1, 1, b""), (2, 0, b"a"), (3, 2, b""), (4, 0, b"b")]


async def test_a_fence_is_read_up_to_its_sequence(logs: list[FencedLog]) -> None:
    await logs[0].open("ann")
    await logs[0].append(b"a")
    epoch = await logs[1].open("bob")
    await logs[1].append(b"b")
    before = await logs[1].read(0, epoch.sequence, MB, 0)
    assert [each.sequence for each in before] == [1, 2, 3]
    assert await logs[1].read(epoch.sequence, epoch.sequence, MB, 60) == []


async def test_two_successors_at_once_open_different_epochs(logs: list[FencedLog]) -> None:
    epochs: dict[int, Epoch] = {}

    async def take(k: int) -> None:
        epochs[k] = await logs[k].open(f"owner{k}")

    async with trio.open_nursery() as nursery:
        for k in range(3):
            nursery.start_soon(take, k)
    assert sorted(each.number for each in epochs.values()) == [1, 2, 3]
    assert sorted(each.sequence for each in epochs.values()) == [1, 2, 3]
    last = max(epochs, key=lambda k: epochs[k].sequence)
    for k in range(3):
        if k == last:
            assert await logs[k].append(b"x") == 4
        else:
            with pytest.raises(Fenced):
                await logs[k].append(b"x")


async def test_after_a_cancelled_append_an_epoch_must_be_opened(logs: list[FencedLog]) -> None:
    await logs[0].open("ann")
    with trio.CancelScope() as scope:
        scope.cancel()
        await logs[0].append(b"a")
    with pytest.raises(Fenced, match="no epoch is open"):
        await logs[0].append(b"b")
    assert (await logs[0].open("ann")).number == 2
    await logs[0].append(b"b")


async def test_a_refused_append_leaves_the_epoch_open(
    logs: list[FencedLog], client: NatsClient
) -> None:
    await logs[0].open("ann")
    with pytest.raises(MessageTooLarge):
        await logs[0].append(bytes(client.max_payload + 1))
    assert await logs[0].append(b"a") == 2


class _LosesReplies:
    """Stands for :meth:`Nats.publish`: every other reply is lost, after what it says."""

    def __init__(self, client: NatsClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attempts = 0
        self.forget = False
        publish = Nats.publish

        async def lossy(
            nats: Nats, subject: str, data: bytes, headers: dict[str, str], seconds: float
        ) -> int:
            self.attempts += 1
            sent = dict(headers)
            if self.forget and self.attempts % 2 == 0:  # as after the deduplication window
                sent["Nats-Msg-Id"] += "-again"
            found = await publish(nats, subject, data, sent, seconds)
            if self.attempts % 2:
                raise NatsUnavailable("the reply was lost")
            return found

        monkeypatch.setattr(Nats, "publish", lossy)


@pytest.mark.parametrize("forget", [False, True])
async def test_an_append_whose_reply_was_lost_is_stored_once(
    logs: list[FencedLog], client: NatsClient, monkeypatch: pytest.MonkeyPatch, forget: bool
) -> None:
    replies = _LosesReplies(client, monkeypatch)
    replies.forget = forget
    assert await logs[0].open("ann") == Epoch(1, 1, "ann")
    assert [await logs[0].append(b"%d" % k) for k in range(4)] == [2, 3, 4, 5]
    assert replies.attempts == 10
    monkeypatch.undo()
    assert [data for _, _, data in await contents(logs[1])] == [b"", b"0", b"1", b"2", b"3"]


async def test_an_append_that_a_successor_overtook_is_fenced_even_if_its_reply_was_lost(
    logs: list[FencedLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    await logs[0].open("ann")
    publish = Nats.publish

    async def overtaken(nats: Nats, *args: Any, **more: Mapping[str, Any]) -> int:
        raise NatsUnavailable("lost on its way")

    monkeypatch.setattr(Nats, "publish", overtaken)
    async with trio.open_nursery() as nursery:
        results: list[str] = []

        async def append() -> None:
            try:
                await logs[0].append(b"late")
            except Fenced:
                results.append("fenced")

        nursery.start_soon(append)
        await trio.sleep(0.05)
        monkeypatch.setattr(Nats, "publish", publish)
        await logs[1].open("bob")
    # Its attempts may have won the race; then it was appended before the fence.
    data = [each for each in await contents(logs[1]) if each[2] or each[1] > 1]
    assert results == ["fenced"] or data[0][2] == b"late"
    assert [each[1] for each in await contents(logs[1])].count(2) == 1
    with pytest.raises(Fenced):
        await logs[0].append(b"later")


async def test_epochs_have_different_numbers_even_if_the_answer_of_a_former_leader_is_old(
    logs: list[FencedLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    await logs[0].open("ann")
    old = await logs[0].epoch()
    await logs[1].open("bob")
    read, answers = FencedLog._epoch, []

    async def stale(log: FencedLog, nats: Nats) -> Epoch | None:
        answers.append(old if len(answers) < 3 else await read(log, nats))
        return answers[-1]

    monkeypatch.setattr(FencedLog, "_epoch", stale)
    assert await logs[2].open("eve") == Epoch(3, 3, "eve")
    assert len(answers) == 4
