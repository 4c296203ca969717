"""Turns of the tenants whose requests take long."""

from __future__ import annotations

import time

import trio
from trio.testing import MockClock

from betrace.service.pipeline.request import Reply, Request
from betrace.service.pipeline.stages.heavy import MOST_REQUESTS, HeavyRequests


def request(tenant: str) -> Request:
    return Request(tenant, "protobuf", "", b"", time.time_ns(), 1, Reply())


class Handler:
    """Notes whose request is handled; each takes the seconds of its tenant."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.order: list[str] = []
        self.heavy = HeavyRequests(self.handle)

    async def handle(self, given: Request) -> float:
        await trio.lowlevel.checkpoint()
        self.order.append(given.tenant)
        return self.seconds[given.tenant]


async def test_tenants_have_equal_times():
    handler = Handler(noisy=0.1, quiet=0.005)
    for tenant in ["noisy"] * 10 + ["quiet"] * 40:
        handler.heavy.add(request(tenant))
    handler.heavy.close()
    await handler.heavy.run()
    first = handler.order.index("quiet")
    assert first <= 1  # it waits for one request at most
    # 0.02 s a turn: four of the quiet one's; the noisy one pays for five turns.
    assert handler.order[: first + 21].count("noisy") <= 2
    assert sorted(handler.order) == ["noisy"] * 10 + ["quiet"] * 40
    assert handler.heavy.handled == 50
    assert round(handler.heavy.seconds, 3) == 1.2
    assert len(handler.heavy) == 0


async def test_a_tenant_alone_waits_for_nobody():
    handler = Handler(noisy=10.0)
    for _ in range(3):
        handler.heavy.add(request("noisy"))
    handler.heavy.close()
    await handler.heavy.run()
    assert handler.order == ["noisy"] * 3


async def test_the_share_of_a_tenant_is_bounded():
    handler = Handler()
    for number in range(MOST_REQUESTS):
        assert not handler.heavy.full("a"), number
        handler.heavy.add(request("a"))
    assert handler.heavy.full("a")
    assert not handler.heavy.full("b")
    for tenant in range(100):
        handler.heavy.add(request(str(tenant)))
    handler.heavy.add(request("5"))
    assert handler.heavy.full("5")
    assert not handler.heavy.full("6")


async def test_nothing_is_handled_while_the_stage_is_paused(autojump_clock: MockClock):
    handler = Handler(a=0.0)
    paused = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(handler.heavy.run, lambda: not paused)
        await trio.sleep(1)
        handler.heavy.add(request("a"))
        await trio.sleep(10)
        assert handler.order == []
        paused = False
        await trio.sleep(1)
        assert handler.order == ["a"]
        handler.heavy.close()


async def test_a_failure_does_not_end_the_work(monkeypatch):
    handler = Handler(a=0.0)

    async def fail(given: Request) -> float:
        await trio.lowlevel.checkpoint()
        if given.tenant == "bad":
            raise RuntimeError("injected")
        return await handler.handle(given)

    heavy = HeavyRequests(fail)
    heavy.add(request("bad"))
    heavy.add(request("a"))
    heavy.close()
    await heavy.run()
    assert handler.order == ["a"]
