"""Exports and alerts are sent once by all query nodes together, whichever of them die."""

from __future__ import annotations

import time
from dataclasses import replace

import orjson
import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.duty import Duties, DutyTimes
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query import shared_alerts
from betrace.service.cluster.query.out_queues import OutQueues
from betrace.service.cluster.query.recent_output import RecentOutput
from betrace.service.cluster.query.sending import SharedProgress, SharedTurns, read_sequences
from betrace.service.cluster.query.shared_alerts import PROGRESS, SharedAlerts
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.export import exporter as exporter_module
from betrace.service.export.alerts import alerts as alerts_module
from betrace.service.export.alerts import sender as sender_module
from betrace.service.export.alerts.alert import Alert, Delivered, State
from betrace.service.otlp.partition import partition_of
from betrace.service.storage.alert_store import AlertStore, AlertStoreError
from betrace.service.storage.jetstream.bucket import Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.generations import (
    PARTITIONS_KEY,
    Finished,
    Generations,
    finished_key,
)
from betrace.service.storage.signal_queues import SignalsUnavailable
from betrace.service.traces.verdicts import Decided
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode
from tests.support.failing_stores import signal
from tests.support.http_receiver import receiving
from tests.support.inprocess import settings
from tests.support.query_nodes import FedNode, ListedOut, retraction, until

OTLP = "export-otlp"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for module in (exporter_module, alerts_module, sender_module):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(module, "LONGEST_PAUSE", 0.05)
    for module in (exporter_module, alerts_module):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.1)
    for module in (alerts_module, sender_module):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(alerts_module, "REST_SECONDS", 0.01)
    monkeypatch.setattr(shared_alerts, "COUNTS_SECONDS", 0.2)


@pytest.fixture
def receiver():
    with receiving() as opened:
        yield opened


@pytest.fixture
def config(tmp_path, receiver):
    def make(name, **more):
        sections = {"export": {"otlp": {"endpoint": receiver.url}}} | more
        return settings(tmp_path / name, rules={}, **sections)

    return make


def raised(number, **changes):
    return replace(signal(number), detected_at=time.time_ns(), **changes)


def decide(node, *signals):
    """Add signals to the streams of their partitions."""
    for each in signals:
        partition = partition_of(each.tenant, bytes.fromhex(each.trace_id), 2)
        node.outs[partition].add(Decided(each.tenant, [each], None))


def partition_of_signal(number, partitions):
    found = signal(number)
    return partition_of(found.tenant, bytes.fromhex(found.trace_id), partitions)


def begun(node, key=f"sent.{OTLP}"):
    return key in node.nats.buckets["query"]


async def sent(node, receiver, number):
    """Return when so many signals were received, and the progress is saved."""
    await until(lambda: len(receiver.records()) == number)
    ends = {str(partition): len(out.messages) for partition, out in node.outs.items()}
    saved = node.nats.buckets["query"]
    await until(lambda: read_sequences(saved[f"sent.{OTLP}"].value) == ends)


def exported(receiver):
    return [int.from_bytes(record.trace_id, "big") - 1 for record in receiver.records()]


async def test_a_node_that_is_killed_is_replaced_without_loss_or_repetition(config, receiver):
    node = FedNode()
    decide(node, raised(0))  # from before there was a destination
    async with node.running(config("two"), name="query-2") as two:
        async with node.running(config("one"), name="query-1"):
            await until(lambda: begun(node))
            decide(node, raised(1), raised(2))
            await sent(node, receiver, 2)
        async with node.running(config("one"), name="query-1", die=True):
            decide(node, raised(3))
            await sent(node, receiver, 3)
        decide(node, raised(4), raised(5))
        await until(lambda: len(receiver.records()) == 5)
        await node.applied(two)
    assert sorted(exported(receiver)) == [1, 2, 3, 4, 5]


async def test_a_node_that_lost_everything_exports_nothing_again(config, receiver):
    node = FedNode()
    async with node.running(config("one")):
        await until(lambda: begun(node))
        decide(node, *map(raised, range(1, 8)))
        await sent(node, receiver, 7)
    async with node.running(config("new")) as service:
        await node.applied(service)
        decide(node, raised(9))
        await until(lambda: len(receiver.records()) == 8)
        await node.applied(service)
        assert service.store.counts("acme").signals == 8
    assert sorted(exported(receiver)) == [*range(1, 8), 9]


async def test_a_node_of_the_previous_version_continues_its_exports(config, receiver):
    node = FedNode()
    one = config("one")
    async with node.running(settings(one.storage.path.parent, rules={})) as service:
        decide(node, raised(1))
        await node.applied(service)
    (one.storage.path / "export").mkdir()
    (one.storage.path / "export" / f"{OTLP}.json").write_text('{"acme": 1}')
    decide(node, raised(2))  # while it was down
    async with node.running(one):
        await until(lambda: len(receiver.records()) == 1)
    assert exported(receiver) == [2]


def alert_config(config, receiver, name):
    alerts = {"webhook": {"url": receiver.url, "wait_seconds": 0}}
    return config(name, export={}, alerts=alerts)


def told(receiver):
    return [(each["status"], each["startsAt"]) for each in receiver.alerts()]


async def test_alerts_survive_the_node_that_sends_them(config, receiver):
    node = FedNode()
    first = raised(1)
    async with node.running(alert_config(config, receiver, "two"), name="query-2") as two:
        await until(lambda: begun(node, PROGRESS))
        async with node.running(
            alert_config(config, receiver, "one"), name="query-1", die=True
        ) as one:
            decide(node, first)
            await until(lambda: len(receiver.alerts()) == 1)
            for service in (one, two):  # both show it
                await until(lambda service=service: service.alerts.firing("acme"))
            (alert,) = one.alerts.firing("acme")
            await until(lambda: two.alerts.firing("acme")[0].delivered)
            assert two.alerts.firing("acme")[0].started_ns == alert.started_ns
            assert {one.alerts.book.firing, two.alerts.book.firing} == {0, 1}
            # The node with the duty stops, and the other one continues.
            keeper, other = (one, two) if one.alerts.book.firing else (two, one)
            await keeper.node.cluster.duties.stop()
            await until(lambda: other.alerts.book.firing == 1)
            decide(node, raised(2))
            await until(lambda: other.alerts.firing("acme")[0].count == 2)
            await until(lambda: other.alerts.firing("acme")[0].delivered)
            decide(node, retraction(first), retraction(raised(2)))
            await until(lambda: len(receiver.alerts()) == 2)
            await until(lambda: not one.alerts.firing("acme") and not two.alerts.firing("acme"))
    (was, began), (then, also_began) = told(receiver)
    assert (was, then) == ("firing", "resolved")
    assert began == also_began


async def test_signals_of_a_new_partition_are_sent_after_those_of_its_parent(config, receiver):
    node = FedNode()
    number, other, *_ = (n for n in range(1, 99) if partition_of_signal(n, 2) == 0)
    async with node.running(config("one")):
        await until(lambda: begun(node))
        grown = Generations.of(2).grown(4)
        node.outs |= {partition: ListedOut() for partition in grown.current.partitions}
        node.partitions.note(Entry(PARTITIONS_KEY, grown.to_json(), 1))
        child = 2 + partition_of_signal(number, 4)
        node.outs[child].add(Decided("acme", [raised(number)], None))
        node.outs[0].add(Decided("acme", [raised(other)], None))
        await until(lambda: receiver.records())
        await trio.sleep(0.3)
        assert exported(receiver) == [other]
        node.partitions.note(Entry(finished_key(0), Finished(1, 1).to_json(), 2))
        await until(lambda: len(receiver.records()) == 2)
        assert exported(receiver) == [other, number]


# The parts


async def test_what_is_not_in_memory_is_read_from_the_stream():
    out = ListedOut()
    for number in range(5):
        out.add(Decided("acme", [signal(number)], None), Decided("gone", [signal(9, "gone")], None))
    out.add_bytes(b"")
    recent = RecentOutput(1, 2)
    recent.add(0, 1, [signal(1)])  # nobody needs it
    recent.used = True

    async def last(partition):
        return len(out.messages)

    names = TenantNames({"again": 7}, {"gone"})
    partitions = PartitionMap(None, Generations.of(1))
    queues = OutQueues(partitions, {0: out}.__getitem__, last, recent, names)
    threads = ThreadRunner("test", 1)

    async def read(after):
        page = await threads.run(queues.read, "0", after, 3)
        return [number for number, _ in page.signals], page.upto, page.more

    assert await read(0) == ([1, 2], 2, True)
    reads = out.reads
    for sequence in (3, 4, 5, 6):
        recent.add(0, sequence, [signal(sequence)] if sequence < 6 else [])
    assert await read(6) == ([], 6, False)
    assert await read(4) == ([5], 6, False)
    assert await read(3) == ([4, 5], 6, False)
    assert out.reads == reads
    assert await read(2) == ([3, 4], 4, True)
    assert out.reads == reads + 1
    recent.add(0, 1, [signal(1)])  # the feed begins again
    assert await read(1) == ([], 1, False)
    assert await read(4) == ([5], 6, True)
    assert await threads.run(queues.end, "0") == 6
    out.add(*(Decided(each, [signal(1, each)], None) for each in ("again", "again=7")))
    page = await threads.run(queues.read, "0", 6, 3)
    assert [found for _, found in page.signals] == [signal(1, "again")]
    out.add(Decided("again=8", [signal(1, "again=8")], None))
    with pytest.raises(SignalsUnavailable, match="not known here yet"):
        await threads.run(queues.read, "0", 7, 3)
    assert queues.names() == ["0"]
    assert queues.of([signal(1)]) == {"0"}
    partitions.note(Entry(PARTITIONS_KEY, Generations.of(1).grown(2).to_json(), 1))
    assert queues.names() == ["0", "1", "2"]
    assert queues.of([signal(1)]) in ({"0", "1"}, {"0", "2"})
    assert not queues.may_read("1", {"0": 8})
    partitions.note(Entry(finished_key(0), Finished(3, 8).to_json(), 2))
    assert [queues.may_read("1", {"0": upto}) for upto in (7, 8)] == [False, True]
    assert queues.may_read("0", {})
    out.failure = NatsUnavailable("away")
    with pytest.raises(SignalsUnavailable, match="away"):
        await read(4)
    threads.close()


def test_whole_messages_are_read_at_once():
    recent = RecentOutput(1)
    recent.used = True
    recent.add(0, 1, [signal(1), signal(2), signal(3)])
    recent.add(0, 2, [signal(4)])
    page = recent.read(0, 0, 1)
    assert ([n for n, _ in page.signals], page.upto, page.more) == ([1, 1, 1], 1, True)
    page = recent.read(0, page.upto, 1)
    assert ([n for n, _ in page.signals], page.upto, page.more) == ([2], 2, False)


async def test_progress_never_goes_back():
    bucket = FakeBucket(FakeNode(FakeNats(), "one"), "query")
    progress = SharedProgress(bucket, "sent.x")
    assert await progress.load() is None
    await progress.save({"0": 5, "1": 7})
    await SharedProgress(bucket, "sent.x").save({"0": 9, "1": 2})
    assert await progress.load() == {"0": 9, "1": 7}
    await bucket.put("sent.x", b"damaged")
    assert await progress.load() is None
    await progress.save({"0": 1})
    assert await progress.load() == {"0": 1}


async def test_another_node_that_takes_a_duty_back_is_noticed(tmp_path):
    nats = FakeNats()
    with_both = [alerts_of(nats, tmp_path, name) for name in ("one", "two")]
    (one, duty_one), (two, duty_two) = with_both
    threads = ThreadRunner("test", 1)
    key = ("acme", "r")
    alert = Alert.begin(signal(1), 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(duty_one.run)
        await duty_one.wait_held()
        assert await threads.run(one.progress) is None
        await threads.run(one.save, {}, {"0": 0})
        await threads.run(one.save, {key: alert.dump()}, {"0": 3})
        assert await threads.run(two.progress) == {"0": 0}  # the count is not saved yet
        assert list(await threads.run(two.alerts)) == [key]
        # The alert contains the signals up to 3 already.
        assert two.unknown("0", [(3, signal(1)), (4, signal(2))]) == [signal(2)]
        alert.delivered["x"] = Delivered(State.FIRING, 2)
        await threads.run(two.save, {key: alert.dump()}, {"0": 4})
        alert.delivered["x"] = Delivered(State.RESOLVED, 3)
        with pytest.raises(AlertStoreError, match="another query node"):
            await threads.run(one.save, {key: alert.dump()}, {"0": 4})
        assert not duty_one.held
        nursery.cancel_scope.cancel()
    threads.close()
    duty_two.doubt()


def alerts_of(nats, tmp_path, name):
    view = FakeNode(nats, name)
    duty = Duties(FakeBucket(view, "leases"), name, DutyTimes(6, 2)).get("alerts")
    before = AlertStore(tmp_path / f"{name}.sqlite")
    return SharedAlerts(FakeBucket(view, "query"), duty, before, None), duty


async def test_a_removed_alert_is_removed_after_the_progress(tmp_path):
    nats = FakeNats()
    saved, _ = alerts_of(nats, tmp_path, "one")
    threads = ThreadRunner("test", 1)
    keys = [("acme", "r"), ("acme", "s..t")]
    for rule in keys:
        await threads.run(saved.save, {rule: Alert.begin(signal(1), 1).dump()}, {"0": 1})
    assert not saved.pending
    bucket = nats.buckets["query"]
    await threads.run(saved.save, {keys[0]: None}, {"0": 2})
    assert read_sequences(bucket[PROGRESS].value) == {"0": 2}
    removed = bucket[shared_alerts.alert_bucket_key(keys[0])]
    assert removed.value is None
    assert removed.revision > bucket[PROGRESS].revision
    again, _ = alerts_of(nats, tmp_path, "two")
    assert await threads.run(again.progress) == {"0": 2}
    assert list(again.alerts()) == [keys[1]]
    threads.close()


async def test_alerts_of_the_previous_version_are_taken_over(tmp_path):
    nats = FakeNats()
    view = FakeNode(nats, "one")
    duty = Duties(FakeBucket(view, "leases"), "one", DutyTimes(6, 2)).get("alerts")
    before = AlertStore(tmp_path / "alerts.sqlite")
    alert = Alert.begin(signal(1), 1).dump()
    before.save({("acme", "r"): alert}, {"acme": 1})
    saved = SharedAlerts(FakeBucket(view, "query"), duty, before, {"0": 7})
    threads = ThreadRunner("test", 1)
    assert await threads.run(saved.progress) == {"0": 7}
    assert saved.alerts() == {("acme", "r"): alert}
    view.unavailable = True
    with pytest.raises(AlertStoreError, match="do not answer"):
        await threads.run(saved.progress)
    threads.close()


async def test_a_replica_that_is_behind_is_not_believed(tmp_path):
    saved, _ = alerts_of(FakeNats(), tmp_path, "one")
    threads = ThreadRunner("test", 1)
    await threads.run(saved.save, {}, {"0": 1})

    async def behind(prefix):
        return []

    saved._bucket.entries = behind
    with pytest.raises(AlertStoreError, match="behind"):
        await threads.run(saved.progress)
    threads.close()


async def test_damaged_alerts_are_left_out(tmp_path, caplog):
    nats = FakeNats()
    saved, _ = alerts_of(nats, tmp_path, "one")
    threads = ThreadRunner("test", 1)
    view = FakeBucket(FakeNode(nats, "x"), "query")
    await view.put(PROGRESS, orjson.dumps({"0": 1}))
    await view.put("alerts.acme.x", b"nonsense")
    assert await threads.run(saved.progress) == {"0": 1}
    assert saved.alerts() == {}
    assert any("is damaged" in each.getMessage() for each in caplog.records)
    threads.close()


async def test_each_destination_has_a_duty():
    view = FakeNode(FakeNats(), "one")
    duties = Duties(FakeBucket(view, "leases"), "one", DutyTimes(6, 2))
    turns = SharedTurns(FakeBucket(view, "query"), duties)
    worked = []

    async def work():
        worked.append(True)

    assert await turns.progress("x").load() is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(duties.run)
        await turns.perform("x", work)
        await turns.perform("y", work)  # a duty that is wanted later
        await duties.stop()
        nursery.cancel_scope.cancel()
    assert worked == [True, True]
    assert set(view.nats.buckets["leases"]) == {"duty.x", "duty.y"}
