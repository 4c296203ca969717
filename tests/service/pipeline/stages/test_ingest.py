"""Which requests are handled on Trio's thread, and which in a worker thread."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from betrace.channels import ThreadRunner, open_channel
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline import scanning
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.progress import LogProgress
from betrace.service.pipeline.request import Done, Refused, Reply, Request
from betrace.service.pipeline.rules_in_force import LogWriter
from betrace.service.pipeline.scanning import SMALL_BYTES
from betrace.service.pipeline.stages import ingest
from betrace.service.pipeline.stages.ingest import IngestStage
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.storage.spanlog.log import SpanLog
from tests.support.spans import S, body

pytestmark = pytest.mark.kernel


class Bench:
    """An ingest stage on a log of its own."""

    def __init__(self, directory: Path) -> None:
        self.log = SpanLog(directory)
        self.threads = ThreadRunner("ingest", 1)
        self.sync = GroupSync(self.log, self.threads)
        send, self.receive = open_channel("batches", 10_000, len)
        self.rules = RuleRegistry(RuleStore(directory / "rules"), 10)
        writer = LogWriter(self.log, LogProgress(), self.rules)
        self.stage = IngestStage(writer, self.threads, send, 1 << 20, self.sync)

    async def handle(self, payload: bytes = body(S(1, "a")), encoding: str = "") -> bool:
        """Handle a request, check its outcome, and return whether a thread was used."""
        request = Request("acme", "protobuf", encoding, payload, time.time_ns(), 1, Reply())
        before = self.threads.statistics().calls
        await self.stage.handle([request])
        outcome = await request.reply.wait()
        assert isinstance(outcome, Done)
        assert outcome.spans == len(self.receive.receive_nowait()) > 0
        return self.threads.statistics().calls > before

    async def work_off(self) -> None:
        """Handle the requests that take long."""
        self.stage.heavy.close()
        await self.stage.heavy.run()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(ingest, "SLOW_SECONDS", 3600)  # no write is slow by chance
    bench = Bench(tmp_path)
    yield bench
    bench.threads.close()
    bench.log.close()


async def test_small_requests_need_no_thread_once_the_segment_exists(bench: Bench) -> None:
    assert await bench.handle()  # creates the segment
    assert not await bench.handle()
    assert not await bench.handle()
    frames = list(bench.log.frames("acme"))
    assert len(frames) == 3


async def test_large_and_compressed_requests_go_to_a_thread(bench: Bench) -> None:
    await bench.handle()
    large = body(*(S(number, f"{number:0500}") for number in range(1, SMALL_BYTES // 500)))
    assert await bench.handle(large)
    assert await bench.handle(gzip.compress(body(S(1, "a"))), "gzip")


async def test_requests_go_to_a_thread_while_the_disk_syncs(bench: Bench) -> None:
    await bench.handle()
    bench.sync.running = True
    assert await bench.handle()
    bench.sync.running = False
    assert not await bench.handle()


async def test_after_a_slow_write_requests_go_to_a_thread_for_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # it does not wait for threads
    await bench.handle()
    append = bench.log.append

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "SLOW_SECONDS", 0.01)
        patch.setattr(bench.log, "append", slow)
        assert not await bench.handle()
    assert await bench.handle()
    await trio.sleep(ingest.THREAD_SECONDS)
    assert not await bench.handle()


async def test_slow_writes_soon_after_each_other_send_requests_to_the_thread_for_longer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    for expected in (1, 2, 4, 8, 16, 32, 32):
        bench.stage._use_thread()
        until = bench.stage._inline_from
        assert until == pytest.approx(trio.current_time() + expected * ingest.THREAD_SECONDS)
        await trio.sleep_until(until + 1)
    await trio.sleep(ingest.RELAPSE_SECONDS)
    bench.stage._use_thread()
    assert bench.stage._inline_from == pytest.approx(trio.current_time() + ingest.THREAD_SECONDS)


def request(payload: bytes) -> Request:
    return Request("acme", "protobuf", "", payload, time.time_ns(), 1, Reply())


async def test_a_small_request_is_answered_in_the_call(bench: Bench) -> None:
    assert not bench.stage.handle_now(request(body(S(1, "a"))))  # there is no segment yet
    await bench.handle()
    asked = request(body(S(1, "a"), S(2, "b")))
    freed: list[tuple[str, int]] = []
    asked.on_release = lambda *call: freed.append(call)
    assert bench.stage.handle_now(asked)
    outcome = await asked.reply.wait()
    assert isinstance(outcome, Done)
    assert outcome.spans == len(bench.receive.receive_nowait()) == 2
    assert freed == [("acme", 1)]
    assert bench.stage.counts.accepted == 3
    wrong = request(b"\xff")
    assert bench.stage.handle_now(wrong)
    assert isinstance(await wrong.reply.wait(), Refused)


async def test_a_request_waits_if_the_next_channel_fills_up_or_it_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.handle()
    with monkeypatch.context() as patch:
        patch.setattr(bench.stage, "_ingest", lambda requests: 1 / 0)
        assert not bench.stage.handle_now(request(body(S(1, "a"))))
    many = body(*(S(number, "a") for number in range(1, 8000)))
    await bench.stage.handle([request(many)])
    assert not bench.stage.handle_now(request(body(S(1, "a"))))
    bench.receive.receive_nowait()
    assert bench.stage.handle_now(request(body(S(1, "a"))))
    bench.receive.close()  # what is in the log is read again after a restart
    assert bench.stage.handle_now(request(body(S(1, "a"))))


async def test_a_sync_says_that_it_is_running(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.handle()
    seen: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(bench.log, "sync", lambda _: seen.append(bench.sync.running))
        await bench.sync.sync(["acme"])
    assert seen == [True]
    assert not bench.sync.running


async def test_a_request_with_too_many_spans_is_refused_and_the_others_are_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "MOST_SPANS", 3)
    monkeypatch.setattr(scanning, "QUICK_SPANS", 2)
    requests = [with_spans(spans) for spans in (1, 4, 3, 2)]
    await bench.stage.handle(requests)
    await bench.work_off()
    outcomes = [await each.reply.wait() for each in requests]
    refused = outcomes.pop(1)
    assert isinstance(refused, Refused)
    assert (refused.status, "more than 3 spans" in refused.message) == (413, True)
    assert [each.spans for each in outcomes if isinstance(each, Done)] == [1, 3, 2]
    assert sum(frame.spans for _, frame in bench.log.frames("acme")) == 6


def with_spans(spans: int, tenant: str = "acme") -> Request:
    payload = body(*(S(number + 1, "a") for number in range(spans)))
    return Request(tenant, "protobuf", "", payload, time.time_ns(), 1, Reply())


async def test_requests_that_take_long_keep_no_others_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "QUICK_BYTES", 1000)
    released = []
    long = [with_spans(100), with_spans(1)]
    long[1].encoding, long[1].body = "gzip", gzip.compress(bytes(long[0].body))
    for each in long:
        each.on_release = lambda tenant, weight: released.append(tenant)
    quick = with_spans(1, "quick")
    await bench.stage.handle([*long, quick])
    assert quick.reply.known
    assert [each.reply.known for each in long] == [False, False]
    assert len(bench.stage.heavy) == 2
    assert released == ["acme"] * 2  # they take no capacity of the channel
    await bench.stage.handle(long)  # a redelivery
    assert len(bench.stage.heavy) == 2
    await bench.work_off()
    assert [(await each.reply.wait()).spans for each in long] == [100, 100]  # type: ignore[union-attr]
    assert all(each.seconds > 0 for each in long)
    assert len(list(bench.log.frames("acme"))) == 2


async def test_very_many_spans_pass_by_the_next_channel(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(ingest, "QUICK_SPANS", 50)
    monkeypatch.setattr(ingest, "POLITE_SECONDS", 0.01)
    autojump_clock.autojump_threshold = 0.05  # it does not wait for threads
    passed: list[int] = []

    async def pass_on_many(batch: Any) -> None:
        await trio.lowlevel.checkpoint()
        passed.append(len(batch))

    bench.stage.pass_on_many = pass_on_many
    for spans in (100, 50, 20):
        bench.stage.set_aside(with_spans(spans))
    full = scan_bodies("acme", [body(*[S(1, "a")] * 9_990)])  # of 10 000
    await bench.stage._onward.send(full)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.work_off)
        await trio.sleep(1)
        assert passed == [100]
        taken = [len(bench.receive.receive_nowait())]
        await trio.sleep(1)
        taken += [len(bench.receive.receive_nowait()) for _ in range(2)]
    assert taken == [9_990, 50, 20]


async def test_small_tenants_are_handled_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PORTION_BYTES", 1000)
    order: list[list[str]] = []
    handle = bench.stage._handle

    async def note(requests: list[Request]) -> None:
        order.append([each.tenant for each in requests])
        await handle(requests)

    monkeypatch.setattr(bench.stage, "_handle", note)
    requests = [with_spans(n, tenant) for n, tenant in ((30, "a"), (1, "b"), (20, "c"), (1, "d"))]
    await bench.stage.handle(requests)
    assert order == [["b", "d"], ["c"], ["a"]]
    assert all(each.reply.known for each in requests)
    order.clear()
    await bench.stage.handle([with_spans(30, "a"), with_spans(30, "a")])
    assert order == [["a", "a"]]


async def test_a_failure_of_a_request_that_takes_long_refuses_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(bench.stage, "_ingest", fail)
    failing = with_spans(1)
    bench.stage.set_aside(failing)
    await bench.work_off()
    outcome = await failing.reply.wait()
    assert isinstance(outcome, Refused)
    assert outcome.status == 503
    assert bench.stage.counts.refused_requests == 1
