"""One tenant's rules and spans need much CPU time; the others must not notice."""

from __future__ import annotations

import random

import pytest
import trio

from betrace.service.app.service import Service
from betrace.service.pipeline.request import Done
from tests.support.inprocess import (
    active_signals,
    closed,
    folded,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.spans import TRACE, S

TRACE_ID = TRACE.hex()
EXPENSIVE = " or ".join(f'x matches "[ab]*a[ab]{{{250 - n}}}c"' for n in range(20))


def text(seed: int) -> str:
    """A text in which the patterns need many states."""
    return "".join(random.Random(seed).choices("ab", k=16_000))


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, {"slow": f"a.where({EXPENSIVE})", "many": "count(a) > 2"}, "noisy")
    write_rules(tmp_path, {"quick": "a.where(x == 1)"}, "quiet")
    return settings(tmp_path)


async def quiet_signal(service: Service, number: int) -> None:
    """Return when the quiet tenant has a signal."""
    trace = bytes([number + 1]) * 16
    await send(service, [S(1, trace=trace, x="1")], tenant="quiet")
    with trio.fail_after(60):
        while (trace.hex(), "quick") not in active_signals(service, "quiet"):
            await trio.sleep(0.01)


def waits(service: Service, tenant: str = "noisy") -> bool:
    return tenant in service.pipeline.correlate.backlog.shown()


async def until_done(service: Service) -> None:
    with trio.fail_after(60):
        while waits(service):
            await trio.sleep(0.05)


async def until_waiting(service: Service) -> None:
    with trio.fail_after(60):
        while not waits(service):
            await trio.sleep(0.01)


async def test_expensive_patterns_delay_only_their_own_tenant(config):
    async with running(config) as service:
        await quiet_signal(service, 0)
        await send(service, [S(n, x=text(n)) for n in range(1, 6)], tenant="noisy")
        await until_waiting(service)
        for number in range(1, 4):
            await quiet_signal(service, number)
            assert waits(service)  # much longer than the quiet tenant
        assert service.sources.account().balance == 0
        await until_done(service)
        await folded(service)
        await closed(service)
        assert active_signals(service, "noisy") == {(TRACE_ID, "many")}
        assert service.pipeline.open_traces.counts.repeated == 0
        assert service.sources.account().balance == 0


async def test_spans_of_a_waiting_tenant_close_no_trace_early(config):
    async with running(config) as service:
        await send(service, [S(1, x="b")], tenant="noisy")
        await send(service, [S(n, x=text(n)) for n in (2, 3)], tenant="noisy")
        await until_waiting(service)
        deadline = trio.current_time() + 60
        while waits(service) and trio.current_time() < deadline:
            assert service.pipeline.open_traces.counts.closed == 0  # the idle time is 0.2 s
            await trio.sleep(0.01)
        await closed(service)
        assert service.pipeline.open_traces.counts.closed == 1
        assert service.pipeline.open_traces.counts.reopened == 0


async def test_a_waiting_tenant_is_told_to_send_later_when_it_has_its_share(config, monkeypatch):
    monkeypatch.setattr("betrace.service.pipeline.stages.backlog.MOST_SPANS", 2)
    monkeypatch.setattr("betrace.service.pipeline.stages.backlog._LEAST_SPANS", 2)
    async with running(config) as service:
        await send(service, [S(n, x=text(n)) for n in range(1, 4)], tenant="noisy")
        await until_waiting(service)
        headers = [(b"content-type", b"application/x-protobuf")]
        noisy = [*headers, (b"x-scope-orgid", b"noisy")]
        refused = await service.admission.admit("POST", "/v1/traces", noisy)
        assert refused.status == 429  # type: ignore[union-attr]
        assert b"retry-after" in dict(refused.headers)  # type: ignore[union-attr]
        assert b"processor time" in refused.body  # type: ignore[union-attr]
        quiet = [*headers, (b"x-scope-orgid", b"quiet")]
        assert not hasattr(await service.admission.admit("POST", "/v1/traces", quiet), "status")
        assert service.admission.refusals.requests["backlog"] == 1


async def test_a_restart_is_quick_and_continues_where_the_fold_stopped(config):
    async with running(config, die=True) as service:
        await send(service, [S(n, x=text(n)) for n in range(1, 6)], tenant="noisy")
        await until_waiting(service)
        await trio.sleep(0.5)  # some of it is folded
        assert await service.recovery.save()
    async with running(config) as service:
        assert waits(service)
        await quiet_signal(service, 1)
        await until_done(service)
        await closed(service)
        assert active_signals(service, "noisy") == {(TRACE_ID, "many")}
        assert service.pipeline.open_traces.counts.repeated == 0


async def test_the_stop_does_not_wait_for_all_that_waits(tmp_path):
    write_rules(tmp_path, {"slow": f"a.where({EXPENSIVE})"}, "noisy")
    config = settings(tmp_path, shutdown={"grace_seconds": 3})
    async with running(config) as service:
        await send(service, [S(n, x=text(n)) for n in range(1, 20)], tenant="noisy")
        await until_waiting(service)
    assert waits(service)
    async with running(settings(tmp_path), die=True) as service:
        assert service.recovery.saved_at is not None
        assert waits(service)  # read again from the log


async def test_a_deleted_tenant_does_not_finish_what_waits(config):
    async with running(config) as service:
        await send(service, [S(n, x=text(n)) for n in range(1, 20)], tenant="noisy")
        await until_waiting(service)
        with trio.fail_after(60):
            done = await service.removal.begin("noisy")
            await done.wait()
        assert not waits(service)
        await quiet_signal(service, 1)


async def test_many_ordinary_patterns_are_searched_together(tmp_path):
    rules = {f"r{n}": f'a.where(x matches "a.*b{n}")' for n in range(300)}
    write_rules(tmp_path, rules, "noisy")
    write_rules(tmp_path, {"quick": "a.where(x == 1)"}, "quiet")
    async with running(settings(tmp_path)) as service:
        spans = [S(n, x=f"some text {n}") for n in range(1, 1001)]
        outcome = await send(service, [*spans, S(2000, x="xx ab77")], tenant="noisy")
        assert outcome == Done(1001)
        await quiet_signal(service, 1)
        await until_done(service)
        await closed(service)
        assert active_signals(service, "noisy") == {(TRACE_ID, "r77"), (TRACE_ID, "r7")}
