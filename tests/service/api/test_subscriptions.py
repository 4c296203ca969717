"""Listeners to signals: each its tenant's, and a slow one misses some."""

from __future__ import annotations

import pytest
import trio

from betrace.service.api.subscriptions import BUFFER, Subscriptions, TooManyStreams
from betrace.service.signals import Kind, Signal


def signal(number: int = 0, tenant: str = "t") -> Signal:
    return Signal(
        id=f"{number:032x}",
        tenant=tenant,
        rule_id="r",
        rule_version="v",
        severity="high",
        kind=Kind.RAISED,
        clause="never",
        trace_id="1" * 32,
        detected_at=number,
        early=False,
        counts={},
        evidence={},
        message="",
    )


async def test_a_listener_gets_its_tenants_signals_in_order():
    subscriptions = Subscriptions(2)
    listener, other = subscriptions.open("t"), subscriptions.open("other")
    subscriptions.publish([signal(1), signal(2, "other"), signal(3)])
    assert [(await listener.receive())["detected_at"] for _ in range(2)] == [1, 3]
    assert (await other.receive())["tenant"] == "other"


async def test_what_comes_is_the_signals_json():
    subscriptions = Subscriptions(1)
    listener = subscriptions.open("t")
    subscriptions.publish([signal(7)])
    assert await listener.receive() == signal(7).to_json()


async def test_a_slow_listener_misses_signals_and_delays_nobody():
    subscriptions = Subscriptions(2)
    slow, quick = subscriptions.open("t"), subscriptions.open("t")
    for number in range(BUFFER + 5):
        subscriptions.publish([signal(number)])
        assert (await quick.receive())["detected_at"] == number
    assert (slow.missed, quick.missed) == (5, 0)
    received = [(await slow.receive())["detected_at"] for _ in range(BUFFER)]
    assert received == list(range(BUFFER))
    subscriptions.publish([signal(99)])  # there is room again
    assert (await slow.receive())["detected_at"] == 99


async def test_there_are_as_many_listeners_as_allowed():
    subscriptions = Subscriptions(1)
    first = subscriptions.open("t")
    with pytest.raises(TooManyStreams, match="1 streams are open"):
        subscriptions.open("t")
    first.close()
    first.close()
    subscriptions.open("t").close()


async def test_who_left_gets_nothing_and_disturbs_nothing():
    subscriptions = Subscriptions(2)
    gone, there = subscriptions.open("t"), subscriptions.open("t")
    gone.close()
    subscriptions.publish([signal(1)])
    assert (await there.receive())["detected_at"] == 1


async def test_when_the_service_stops_the_streams_end_after_what_they_have():
    subscriptions = Subscriptions(2)
    listener = subscriptions.open("t")
    subscriptions.publish([signal(1)])
    subscriptions.close()
    assert (await listener.receive())["detected_at"] == 1
    with pytest.raises(trio.EndOfChannel):
        await listener.receive()
    listener.close()


async def test_after_the_end_nothing_fails_and_no_stream_waits_for_ever():
    subscriptions = Subscriptions(3)
    listener = subscriptions.open("t")
    subscriptions.close()
    subscriptions.publish([signal(1)])
    with pytest.raises(trio.EndOfChannel):
        await listener.receive()
    late = subscriptions.open("t")
    with trio.fail_after(1), pytest.raises(trio.EndOfChannel):
        await late.receive()
