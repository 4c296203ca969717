"""Ingestion on an edge: requests become parts of partitions, and each is answered once all of its
parts are stored. With a log in memory, in virtual time."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.edge.group_commit import GroupCommit
from betrace.service.cluster.edge.ingest import EdgeIngest, group_bytes
from betrace.service.cluster.edge.partition_groups import STALL_SECONDS
from betrace.service.otlp import split as split_module
from betrace.service.otlp.partition import partition_of
from betrace.service.pipeline.request import Done, Refused, Reply, Request
from betrace.service.storage.jetstream.errors import StreamFull
from betrace.service.storage.jetstream.generations import Generation
from tests.support import virtual
from tests.support.fake_span_log import FakeSpanLog
from tests.support.spans import S, body

PARTITIONS = 8
MIB = 1 << 20


def trace(number: int) -> bytes:
    return number.to_bytes(16, "big")


def in_partition(partition: int, tenant: str = "acme") -> bytes:
    """The id of a trace in this partition."""
    return next(
        trace(n) for n in range(1, 1000) if partition_of(tenant, trace(n), PARTITIONS) == partition
    )


def request(payload: bytes, tenant: str = "acme", encoding: str = "") -> Request:
    return Request(tenant, "protobuf", encoding, payload, time.time_ns(), 1, Reply())


class Bench:
    def __init__(self, most_group_bytes: int = MIB, most_bytes: int = 64 * MIB) -> None:
        self.log = FakeSpanLog()
        self.threads = ThreadRunner("ingest", 2)
        log: Any = self.log
        self.commit = GroupCommit(log, PARTITIONS, self.threads, most_group_bytes, most_bytes)
        self.generation = Generation(0, PARTITIONS)
        self.stage = EdgeIngest(self.commit, self.threads, lambda: self.generation, MIB)

    async def outcomes(self, *requests: Request) -> list[Done | Refused]:
        """Handle requests together."""
        await self.stage.handle(list(requests))
        return [await each.reply.wait() for each in requests]


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench(**options)
    with bench.threads:
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.commit.run)
            yield bench
            nursery.cancel_scope.cancel()


async def test_spans_reach_the_partitions_of_their_traces():
    async with running() as bench:
        numbers = range(1, 60)
        payloads = [body(*(S(n, trace=trace(n)) for n in numbers if n % 3 == k)) for k in range(3)]
        tenants = ["acme", "acme", "other"]
        outcomes = await bench.outcomes(*map(request, payloads, tenants))
        assert [each.spans for each in outcomes if isinstance(each, Done)] == [19, 20, 20]
        assert set(bench.log.spans().values()) == {1}
        assert len(bench.log.spans()) == 59
        for partition, frame in bench.log.frames():
            for number in numbers:
                if trace(number) in bytes(frame.body):
                    assert partition_of(frame.tenant, trace(number), PARTITIONS) == partition
        assert len(list(bench.log.frames())) <= 2 * PARTITIONS  # one for each tenant
        assert bench.stage.counts.accepted == 59


async def test_after_a_change_spans_go_to_the_new_partitions():
    async with running() as bench:
        assert await bench.outcomes(request(body(S(1, trace=trace(1))))) == [Done(1)]
        bench.generation = Generation(PARTITIONS, 2 * PARTITIONS)
        spans = [S(number, trace=trace(number)) for number in range(2, 60)]
        assert await bench.outcomes(request(body(*spans))) == [Done(58)]
        found = [p for p, frame in bench.log.frames() if trace(1) not in bytes(frame.body)]
        assert set(found) <= set(bench.generation.partitions)
        assert sum(bench.commit.partition_spans[PARTITIONS:]) == 58


async def test_invalid_requests_and_spans_are_refused_as_without_a_cluster():
    bad = body(S(1), S(2, trace=bytes(16)), S(0))
    async with running() as bench:
        outcomes = await bench.outcomes(
            request(bad), request(b"\x07"), request(b""), request(b"x", encoding="gzip")
        )
        partial, wrong, empty, broken = outcomes
        assert isinstance(partial, Done)
        assert (partial.spans, partial.rejected) == (1, 2)
        assert "trace id" in partial.message
        assert isinstance(wrong, Refused)
        assert isinstance(broken, Refused)
        assert (wrong.status, broken.status) == (400, 400)
        assert empty == Done(0)
        assert bench.log.spans() == {("acme", 1): 1}
        assert bench.stage.counts.refused_requests == 2


async def test_a_span_that_fits_into_no_message_is_refused_alone():
    async with running(most_group_bytes=group_bytes(4096)) as bench:
        large = request(body(S(1, trace=trace(1)), S(2, "n" * 4000, trace=trace(2))))
        refused, done = await bench.outcomes(large, request(body(S(3))))
        assert isinstance(refused, Refused)
        assert refused.status == 413
        assert "max_payload" in refused.message
        assert done == Done(1)
        assert bench.log.spans() == {("acme", 3): 1}
        assert all(len(m) <= 4096 for messages in bench.log.messages.values() for m in messages)


async def test_incompressible_spans_fit_into_messages():
    rng = random.Random(1)
    async with running(most_group_bytes=group_bytes(65536)) as bench:
        text = "".join(chr(rng.randrange(32, 127)) for _ in range(40_000))
        requests = [request(body(S(n, text))) for n in range(1, 6)]
        outcomes = await bench.outcomes(*requests)
        assert outcomes == [Done(1)] * 5
        assert len(bench.log.spans()) == 5
        assert all(len(m) <= 65536 for messages in bench.log.messages.values() for m in messages)


async def test_resources_copied_too_often_are_refused_alone(monkeypatch):
    monkeypatch.setattr(split_module, "_MOST_COPIED", 50_000)
    async with running() as bench:
        spans = [S(n, trace=trace(n), service="s" * 10_000) for n in range(1, 50)]
        refused, done = await bench.outcomes(request(body(*spans)), request(body(S(99))))
        assert isinstance(refused, Refused)
        assert refused.status == 413
        assert "resource" in refused.message
        assert done == Done(1)
        assert bench.log.spans() == {("acme", 99): 1}


async def test_a_request_waits_for_all_of_its_partitions():
    async def before(partition: int) -> None:
        if partition == 3:
            await release.wait()

    async with running() as bench:
        release = trio.Event()
        bench.log.before = before
        both = request(body(S(1, trace=in_partition(1)), S(2, trace=in_partition(3))))
        one = request(body(S(3, trace=in_partition(1))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.stage.handle, [both, one])
            assert await one.reply.wait() == Done(1)
            assert len(bench.log.spans()) == 2
            assert both.reply._outcome is None
            release.set()
        assert await both.reply.wait() == Done(2)


async def test_a_full_partition_refuses_requests_for_it_and_no_others():
    async def before(partition: int) -> None:
        if partition == 3:
            raise StreamFull("maximum bytes exceeded")

    async with running() as bench:
        bench.log.before = before
        spans = [S(1, trace=in_partition(1)), S(2, trace=in_partition(3))]
        first, other = await bench.outcomes(
            request(body(*spans)), request(body(S(3, trace=in_partition(2))))
        )
        assert isinstance(first, Refused)
        assert (first.status, "full" in first.message) == (503, True)
        assert other == Done(1)
        assert bench.log.spans() == {("acme", 1): 1, ("acme", 3): 1}
        (again,) = await bench.outcomes(request(body(*spans)))  # for a while nothing is tried
        assert isinstance(again, Refused)
        assert bench.log.spans()["acme", 1] == 1


def test_without_quorum_requests_are_refused_at_once() -> None:
    async def test() -> None:
        async with running() as bench, trio.open_nursery() as nursery:

            async def never(partition: int) -> None:
                await trio.sleep_forever()

            bench.log.before = never
            nursery.start_soon(bench.stage.handle, [request(body(S(1)))])
            await trio.sleep(STALL_SECONDS + 0.1)
            start = trio.current_time()
            (refused,) = await bench.outcomes(request(body(S(2))))
            assert isinstance(refused, Refused)
            assert (refused.status, "quorum" in refused.message) == (503, True)
            assert trio.current_time() == start
            nursery.cancel_scope.cancel()

    virtual.run(test)


async def test_too_many_buffered_bytes_are_refused():
    async with running(most_bytes=5000) as bench:
        large = request(body(S(1, "n" * 5000)))
        refused, done = await bench.outcomes(large), await bench.outcomes(request(body(S(2))))
        assert isinstance(refused[0], Refused)
        assert (refused[0].status, "too many" in refused[0].message) == (503, True)
        assert done == [Done(1)]


async def test_a_bug_refuses_the_request():
    bench = Bench()
    released = []
    asked = request(body(S(1)))
    asked.on_release = lambda *what: released.append(what)
    await bench.stage.refuse(asked, RuntimeError("injected"), 2)
    outcome = await asked.reply.wait()
    assert isinstance(outcome, Refused)
    assert (outcome.status, released) == (503, [("acme", 1)])


@pytest.mark.parametrize("seed", range(10))
def test_accepted_spans_are_stored_once(seed: int) -> None:
    """Random requests, delays and failures; clients send again until they get a 200."""
    rng = random.Random(seed)

    async def test() -> None:
        async def before(partition: int) -> None:
            await trio.sleep(rng.choice([0, 0.005, 0.1]) * rng.random())
            if rng.random() < 0.05:
                raise StreamFull("full")

        async with running() as bench:
            bench.log.before = before
            sent: Counter[tuple[str, int]] = Counter()
            attempts: Counter[tuple[str, int]] = Counter()

            async def send(number: int) -> None:
                tenant = rng.choice(["acme", "other"])
                ids = [100 * number + k + 1 for k in range(rng.randrange(1, 20))]
                payload = body(*(S(n, "n" * rng.randrange(50), trace=trace(n)) for n in ids))
                sent.update((tenant, n) for n in ids)
                while True:
                    attempts.update((tenant, n) for n in ids)
                    (outcome,) = await bench.outcomes(request(payload, tenant))
                    if isinstance(outcome, Done):
                        assert outcome == Done(len(ids))
                        return
                    await trio.sleep(1)

            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(send, number)
                    await trio.sleep(rng.choice([0, 0.01, 0.1]))
            stored = bench.log.spans()
            assert set(stored) == set(sent)
            assert all(stored[span] <= attempts[span] for span in stored)
            assert max(sent.values()) == 1

    virtual.run(test)
