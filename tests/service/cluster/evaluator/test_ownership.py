"""Owners of partitions in virtual time: takeover, freeze, fence, hand-over, damage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import date
from unittest import mock

import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator import first_rules, housekeeping, work
from betrace.service.cluster.membership import drain_key
from betrace.service.cluster.rule_keys import PUBLISHED
from betrace.service.storage.jetstream.archive_progress import ArchiveProgress, write_progress
from betrace.service.storage.jetstream.errors import StreamFull
from tests.support import virtual
from tests.support.cluster_fakes import FakeBucket, FakeEvaluator, FakeNats, FakeNode
from tests.support.virtual import wait_until

PARTITIONS = range(4)


class Cluster:
    """Fake servers with some evaluators, and what was sent to each partition."""

    def __init__(self, nursery: trio.Nursery, threads: ThreadRunner) -> None:
        self.nats = FakeNats()
        self.nursery = nursery
        self.threads = threads
        self.sent: dict[int, list[str]] = {p: [] for p in PARTITIONS}

    def start(self, name: str, **options) -> FakeEvaluator:
        evaluator = FakeEvaluator(self.nats, name, self.threads, **options)
        self.nursery.start_soon(evaluator.run)
        return evaluator

    def send(self, partition: int, number: int = 1) -> None:
        for _ in range(number):
            body = f"{partition}/{len(self.sent[partition])}"
            self.sent[partition].append(body)
            self.nats.put_spans(partition, body)

    def send_all(self, number: int = 1) -> None:
        for partition in PARTITIONS:
            self.send(partition, number)

    async def send_for(self, seconds: float, interval: float = 0.05) -> None:
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            self.send_all()
            await trio.sleep(interval)

    def is_done(self) -> bool:
        return all(len(self.nats.signals(p)) >= len(self.sent[p]) for p in PARTITIONS)

    async def finish(self) -> None:
        """Wait for all signals; each must be there exactly once, in order."""
        await wait_until(self.is_done)
        await trio.sleep(3)
        self.check()

    def check(self) -> None:
        for partition in PARTITIONS:
            assert self.nats.signals(partition) == self.sent[partition]


@asynccontextmanager
async def fake_cluster():
    with ThreadRunner("evaluators", 16) as threads:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(600):
                yield Cluster(nursery, threads)
            nursery.cancel_scope.cancel()


in_virtual_time = virtual.with_world(fake_cluster)


def all_owned(*evaluators: FakeEvaluator) -> Callable[[], bool]:
    def owned() -> bool:
        found = sorted(p for each in evaluators for p in each.owned)
        current = all(
            each.evaluator.statuses[p].phase == "current" for each in evaluators for p in each.owned
        )
        return found == list(PARTITIONS) and current

    return owned


@in_virtual_time
async def test_one_evaluator_owns_everything_and_decides_each_span_once(cluster):
    one = cluster.start("one")
    cluster.send_all(5)
    await wait_until(all_owned(one))
    await cluster.send_for(3)
    await cluster.finish()
    assert all(status.lag_messages == 0 for status in one.evaluator.statuses)


@in_virtual_time
async def test_results_of_few_spans_come_at_once(cluster):
    one = cluster.start("one")
    await wait_until(all_owned(one))
    await trio.sleep(2)
    began = trio.current_time()
    cluster.send(0)
    await wait_until(lambda: cluster.nats.signals(0) == cluster.sent[0])
    assert trio.current_time() - began < 0.2


@in_virtual_time
async def test_a_quiet_partition_gets_ticks_until_nothing_is_left_to_close(cluster):
    one = cluster.start("one")
    await wait_until(all_owned(one))
    before = len(cluster.nats.logs["spans-0"])
    await trio.sleep(10)
    ticks = len(cluster.nats.logs["spans-0"]) - before
    assert 15 < ticks <= 20
    one.states[0].rests = True
    await trio.sleep(2)
    lengths = {name: len(log) for name, log in cluster.nats.logs.items() if name.endswith("-0")}
    await trio.sleep(10)
    for name, length in lengths.items():
        assert len(cluster.nats.logs[name]) == length
    assert cluster.nats.outputs(0)[-1].upto == lengths["spans-0"]


@in_virtual_time
async def test_a_newcomer_gets_its_share_and_only_moved_partitions_pause(cluster):
    one = cluster.start("one")
    await wait_until(all_owned(one))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_for, 8)
        await trio.sleep(2)
        epochs = [status.epoch for status in one.evaluator.statuses]
        two = cluster.start("two")
        await wait_until(lambda: len(two.owned) == 2 and all_owned(one, two)())
    await cluster.finish()
    kept = one.owned
    assert len(kept) == 2
    assert [one.evaluator.statuses[p].epoch for p in kept] == [epochs[p] for p in kept]
    pauses = [two.evaluator.statuses[p].takeover_seconds for p in two.owned]
    assert max(pauses) < 0.2
    assert not any(status.fenced for status in one.evaluator.statuses)


@in_virtual_time
async def test_the_partitions_of_a_killed_evaluator_move(cluster):
    one, two = cluster.start("one"), cluster.start("two")
    await wait_until(all_owned(one, two))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_for, 12)
        await trio.sleep(7)
        kept = {p: two.evaluator.statuses[p].epoch for p in two.owned}
        before = {p: len(cluster.nats.signals(p)) for p in kept}
        one.scope.cancel()
        killed = trio.current_time()
        await trio.sleep(1)  # the others continue
        assert two.owned == list(kept)
        assert all(len(cluster.nats.signals(p)) > before[p] + 10 for p in kept)
        await wait_until(all_owned(two))
        assert trio.current_time() - killed < 4
        assert {p: two.evaluator.statuses[p].epoch for p in kept} == kept
    await cluster.finish()


@mock.patch.object(work, "GATHER_SECONDS", 0)  # it has results to append when it wakes up
@in_virtual_time
async def test_a_frozen_evaluator_wakes_up_fenced_and_joins_again(cluster):
    one, two = cluster.start("one"), cluster.start("two")
    leases = one.parts.leases._bucket.node = FakeNode(cluster.nats, "one")
    await wait_until(all_owned(one, two))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_for, 20)
        await trio.sleep(4)
        leases.freeze()
        one.node.freeze()
        await wait_until(lambda: two.owned == list(PARTITIONS))
        await trio.sleep(4)
        one.node.thaw()
        await trio.sleep(0.5)
        leases.thaw()  # it learns of its lost leases after its appends were refused
        await wait_until(lambda: len(one.owned) == len(two.owned) == 2)
    await cluster.finish()
    assert sum(status.fenced for status in one.evaluator.statuses) > 0
    assert not any(status.fenced for status in two.evaluator.statuses)


@in_virtual_time
async def test_an_evaluator_that_cannot_reach_the_servers_judges_nobody(cluster):
    one, two = cluster.start("one"), cluster.start("two")
    await wait_until(all_owned(one, two))
    one.node.unavailable = two.node.unavailable = True
    await trio.sleep(10)
    assert set(one.membership.alive()) == set(two.membership.alive()) == {"one", "two"}
    one.node.unavailable = two.node.unavailable = False
    await trio.sleep(5)
    assert len(one.owned) == len(two.owned) == 2
    await cluster.send_for(1)
    await cluster.finish()


@in_virtual_time
async def test_two_owners_at_once_one_fence_wins(cluster):
    """Leases that do not work at all: both evaluators believe that they own everything."""
    one, two = cluster.start("one"), FakeEvaluator(cluster.nats, "two", cluster.threads)
    stranger = FakeNode(cluster.nats, "two")
    two.parts.leases._bucket = FakeBucket(stranger, "other-leases")
    two.membership.bucket = FakeBucket(stranger, "other-members")
    await wait_until(all_owned(one))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_for, 8, 0.2)
        await trio.sleep(1)
        cluster.nursery.start_soon(two.run)
        await trio.sleep(5)
        # Each takes the partitions back again, and all appends are those of the last epoch.
        assert sum(status.fenced for status in one.evaluator.statuses) >= 4
        two.scope.cancel()
    await cluster.finish()


@in_virtual_time
async def test_stopping_hands_over_without_waiting_for_the_lease(cluster):
    one, two = cluster.start("one"), cluster.start("two")
    await wait_until(all_owned(one, two))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_for, 6)
        await trio.sleep(2)
        began = trio.current_time()
        one.evaluator.stop()
        await wait_until(all_owned(two))
        assert trio.current_time() - began < 1
    await cluster.finish()
    assert "one" not in two.membership.alive()
    assert not any(status.fenced for status in one.evaluator.statuses)


@in_virtual_time
async def test_draining_moves_everything_and_the_last_one_keeps_its_partitions(cluster):
    one, two = cluster.start("one"), cluster.start("two")
    await wait_until(all_owned(one, two))
    bucket = FakeBucket(FakeNode(cluster.nats, "operator"), "members")
    await bucket.put(drain_key("two"), b"")
    await wait_until(all_owned(one))
    assert two.owned == []
    await bucket.put(drain_key("one"), b"")
    await trio.sleep(5)
    assert one.owned == list(PARTITIONS)
    await bucket.delete(drain_key("two"))
    await wait_until(all_owned(two))
    await cluster.send_for(1)
    await cluster.finish()


@in_virtual_time
async def test_a_restart_continues_from_the_checkpoint(cluster):
    one = cluster.start("one")
    await wait_until(all_owned(one))
    await cluster.send_for(3)
    await cluster.finish()
    one.evaluator.stop()
    await wait_until(lambda: one.owned == [])
    cluster.send_all(2)
    two = cluster.start("two")
    await wait_until(all_owned(two))
    await cluster.finish()
    assert two.evaluator.statuses[0].checkpoint_sequence > 60
    assert two.evaluator.statuses[0].unusable_checkpoints == 0


@in_virtual_time
async def test_without_its_newest_checkpoints_a_partition_replays_more(cluster):
    for damage in ("missing", "damaged", "unreadable", "all"):
        one = cluster.start("one", checkpoint_seconds=1.0)
        await wait_until(all_owned(one))
        await cluster.send_for(4)
        await wait_until(cluster.is_done)
        one.scope.cancel()
        await trio.sleep(3)
        for partition in PARTITIONS:
            blobs = cluster.nats.blobs
            names = sorted(name for name in blobs if name.startswith(f"{partition}/"))
            assert len(names) == 2
            if damage == "missing":
                del blobs[names[-1]]
            elif damage == "all":
                for name in names:
                    del blobs[name]
            else:
                blobs[names[-1]] = damage.encode()
        two = cluster.start("one")
        await wait_until(all_owned(two))
        await cluster.finish()
        unusable = sum(status.unusable_checkpoints for status in two.evaluator.statuses)
        assert (unusable > 0) == (damage in ("damaged", "unreadable"))
        two.evaluator.stop()
        await wait_until(lambda two=two: two.owned == [])


@in_virtual_time
async def test_a_log_that_lost_its_tail_contradicts_the_checkpoint(cluster):
    one = cluster.start("one", checkpoint_seconds=1.0)
    await wait_until(all_owned(one))
    await cluster.send_for(4)
    await wait_until(cluster.is_done)
    one.scope.cancel()
    await trio.sleep(3)
    log = cluster.nats.logs["spans-0"]
    newest = max(name for name in cluster.nats.blobs if name.startswith("0/"))
    covered = int(newest.partition("/")[2].partition("-")[0])
    del log[covered - 1 :]  # the checkpoint's anchor is lost
    cluster.nats.put_spans(0, "after")
    two = cluster.start("two")
    await wait_until(all_owned(two))
    await wait_until(lambda: "after" in cluster.nats.signals(0))
    assert two.evaluator.statuses[0].unusable_checkpoints == 1
    assert two.evaluator.statuses[0].gaps == 1
    assert newest not in cluster.nats.blobs
    survivors = set(cluster.sent[0][: covered - 1])
    assert survivors <= set(cluster.nats.signals(0))
    two.scope.cancel()
    await trio.sleep(3)
    three = cluster.start("three")  # it sees outputs about lost messages before later ones
    await wait_until(all_owned(three))
    cluster.nats.put_spans(0, "later")
    await wait_until(lambda: "later" in cluster.nats.signals(0))
    assert cluster.nats.signals(0).count("after") == 1
    assert three.evaluator.statuses[0].unusable_checkpoints == 0


@in_virtual_time
async def test_a_log_that_loses_its_tail_now_is_noticed(cluster):
    one = cluster.start("one")
    await wait_until(all_owned(one))
    await cluster.send_for(2)
    await wait_until(cluster.is_done)
    del cluster.nats.logs["spans-1"][20:]
    await wait_until(lambda: one.evaluator.statuses[1].failures == 1)
    cluster.nats.put_spans(1, "after")
    await wait_until(lambda: "after" in cluster.nats.signals(1))


@in_virtual_time
async def test_deleted_messages_are_a_gap(cluster):
    cluster.send_all(9)
    for number in range(4):
        message = cluster.nats.logs["spans-2"][number]
        cluster.nats.logs["spans-2"][number] = type(message)(message.sequence, 0, b"", -1)
    one = cluster.start("one")
    await wait_until(all_owned(one))
    await wait_until(lambda: cluster.nats.signals(2) == cluster.sent[2][4:])
    assert one.evaluator.statuses[2].gaps == 1


@in_virtual_time
async def test_old_messages_are_deleted_once_checkpoints_cover_them(cluster):
    with mock.patch.object(housekeeping, "EVERY_SECONDS", 5.0):
        one = FakeEvaluator(cluster.nats, "one", cluster.threads)
        one.with_parts(log_days=20 / 86_400)
        cluster.nursery.start_soon(one.run)
        await wait_until(all_owned(one))
        await cluster.send_for(60, interval=1)
        await cluster.finish()
    spans = one.parts.spans
    first = await spans.get(0, await spans.first(0))
    assert first is not None
    assert 15 < trio.current_time() - first.time_ns / 1e9 < 40
    assert cluster.nats.tidied > 0
    one.scope.cancel()
    two = cluster.start("two")
    await wait_until(all_owned(two))
    cluster.send_all(3)
    await cluster.finish()
    assert two.evaluator.statuses[0].unusable_checkpoints == 0
    assert two.evaluator.statuses[0].gaps == 0


@in_virtual_time
async def test_messages_that_are_not_archived_stay(cluster):
    with mock.patch.object(housekeeping, "EVERY_SECONDS", 5.0):
        one = FakeEvaluator(cluster.nats, "one", cluster.threads)
        one.with_parts(log_days=20 / 86_400, archive=True)
        cluster.nursery.start_soon(one.run)
        await wait_until(all_owned(one))
        await cluster.send_for(60, interval=1)
        spans = one.parts.spans
        assert await spans.first(0) == 1
        await write_progress(one.parts.config, ArchiveProgress(date(2025, 1, 31), {0: 7}))
        await cluster.send_for(10, interval=1)
        assert await spans.first(0) == 7
        await cluster.finish()


@in_virtual_time
async def test_rules_reach_every_partition_once(cluster):
    first = cluster.nats.put_rules("acme", b"[1]")
    one = cluster.start("one")
    await wait_until(all_owned(one))
    states = lambda each: list(each.states.values())  # noqa: E731
    await wait_until(lambda: all(s.rules_revisions == {"acme": first} for s in states(one)))
    second = cluster.nats.put_rules("acme", b"[2]")
    await wait_until(lambda: all(s.rules_revisions == {"acme": second} for s in states(one)))
    two = cluster.start("two")
    await wait_until(all_owned(one, two))
    await trio.sleep(3)
    assert all(s.rules_revisions == {"acme": second} for s in states(two))
    markers = [m for m in cluster.nats.logs["spans-0"] if b"BTE1\x03" in m.data]
    assert len(markers) == 3  # one of them says that rules are published


@in_virtual_time
async def test_a_new_cluster_waits_for_its_first_rules_and_begins_with_them(cluster):
    cluster.nats.buckets["config"].clear()
    one = cluster.start("one")
    await wait_until(all_owned(one))
    cluster.send_all(5)
    await trio.sleep(20)
    assert not any(cluster.nats.signals(p) for p in PARTITIONS)
    statuses = one.evaluator.statuses
    assert all(status.waiting == first_rules.NOT_PUBLISHED for status in statuses)
    cluster.nats.put_rules("acme", b"[1]")
    await trio.sleep(20)
    assert not any(state.first_rules for state in one.states.values())
    cluster.nats.put_rules(PUBLISHED, b"[]")
    await cluster.finish()
    assert all(state.first_rules == [b"[1]"] for state in one.states.values())
    assert all(status.waiting is None for status in statuses)
    cluster.nats.put_rules("acme", b"[2]")
    await trio.sleep(5)
    cluster.nats.blobs.clear()
    one.scope.cancel()
    two = cluster.start("two")
    await wait_until(all_owned(two))
    await cluster.finish()
    assert all(state.first_rules == [b"[1]"] for state in two.states.values())


@in_virtual_time
async def test_a_partition_that_waits_for_rules_is_handed_over(cluster):
    cluster.nats.buckets["config"].clear()
    one = cluster.start("one")
    await wait_until(all_owned(one))
    cluster.send_all(5)
    one.evaluator.stop()
    two = cluster.start("two")
    await wait_until(lambda: two.owned == list(PARTITIONS))
    cluster.nats.put_rules(PUBLISHED, b"[]")
    await cluster.finish()


@in_virtual_time
async def test_a_partition_that_fails_does_not_disturb_the_others(cluster):
    one = FakeEvaluator(cluster.nats, "one", cluster.threads)

    def new_state(partition):
        state = FakeEvaluator.new_state(one, partition)
        if partition == 3 and one.evaluator.statuses[3].failures < 3:
            state.apply = None  # raises TypeError
        return state

    one.with_parts(new_state=new_state)
    cluster.nursery.start_soon(one.run)
    cluster.send_all(3)
    await wait_until(lambda: all(cluster.nats.signals(p) for p in range(3)))
    await cluster.finish()
    assert one.evaluator.statuses[3].failures == 3


@in_virtual_time
async def test_a_state_that_waits_is_asked_again(cluster):
    one = FakeEvaluator(cluster.nats, "one", cluster.threads)
    answers = trio.Event()

    def new_state(partition):
        state = FakeEvaluator.new_state(one, partition)
        apply = state.apply

        def waiting(messages):
            if messages:
                later.extend(messages)
            if not answers.is_set():
                state.waiting = "no query node answers"
                return None
            state.waiting = None
            found, later[:] = apply(list(later)), []
            return found

        later = []
        if partition == 0:
            state.apply = waiting
        return state

    one.with_parts(new_state=new_state)
    cluster.nursery.start_soon(one.run)
    cluster.send_all(3)
    await wait_until(lambda: all(cluster.nats.signals(p) for p in (1, 2, 3)))
    assert one.evaluator.statuses[0].waiting == "no query node answers"
    answers.set()
    await cluster.finish()
    assert one.evaluator.statuses[0].waiting is None


@in_virtual_time
async def test_a_takeover_waits_while_the_servers_are_unavailable(cluster):
    one = cluster.start("one", checkpoint_seconds=1.0)
    await wait_until(all_owned(one))
    await cluster.send_for(3)
    one.scope.cancel()
    two = FakeEvaluator(cluster.nats, "two", cluster.threads)

    def new_state(partition):
        two.node.unavailable = True  # after the fence, before the output is read
        return FakeEvaluator.new_state(two, partition)

    two.with_parts(new_state=new_state)
    cluster.nursery.start_soon(two.run)
    await wait_until(lambda: two.node.unavailable)
    await trio.sleep(5)
    assert all(status.takeovers <= 1 for status in two.evaluator.statuses)
    while not all_owned(two)():
        two.node.unavailable = False
        await trio.sleep(0.01)
    await cluster.send_for(1)
    await cluster.finish()
    assert not any(status.failures for status in two.evaluator.statuses)


@in_virtual_time
async def test_checkpoints_that_cannot_be_saved_are_counted(cluster):
    one = FakeEvaluator(cluster.nats, "one", cluster.threads, checkpoint_seconds=1.0)

    async def put(name, data):
        raise StreamFull("no space left")

    one.parts.blobs.put = put
    cluster.nursery.start_soon(one.run)
    await wait_until(all_owned(one))
    await cluster.send_for(3)
    await cluster.finish()
    assert all(status.checkpoint_failures > 1 for status in one.evaluator.statuses)
    assert all(status.checkpoint_at is None for status in one.evaluator.statuses)
