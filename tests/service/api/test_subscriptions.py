"""Listeners get their tenant's signals, and slow ones miss some."""

from __future__ import annotations

import pytest
import trio

from betrace.service.api.subscriptions import BUFFER, Subscriptions
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
    subscriptions = Subscriptions()
    listener, other = subscriptions.open("t"), subscriptions.open("other")
    subscriptions.publish([signal(1), signal(2, "other"), signal(3)])
    assert [(await listener.receive()).detected_at for _ in range(2)] == [1, 3]
    assert (await other.receive()).tenant == "other"


async def test_a_slow_listener_misses_signals_and_delays_no_one():
    subscriptions = Subscriptions()
    slow, quick = subscriptions.open("t"), subscriptions.open("t")
    for number in range(BUFFER + 5):
        subscriptions.publish([signal(number)])
        assert (await quick.receive()).detected_at == number
    assert (slow.missed, quick.missed) == (5, 0)
    received = [(await slow.receive()).detected_at for _ in range(BUFFER)]
    assert received == list(range(BUFFER))
    subscriptions.publish([signal(99)])  # the buffer has space again
    assert (await slow.receive()).detected_at == 99


async def test_closing_a_subscription_is_idempotent_and_leaves_the_others():
    subscriptions = Subscriptions()
    gone, there = subscriptions.open("t"), subscriptions.open("t")
    gone.close()
    gone.close()
    subscriptions.publish([signal(1)])
    assert (await there.receive()).detected_at == 1


async def test_streams_end_after_their_buffered_signals():
    subscriptions = Subscriptions()
    listener = subscriptions.open("t")
    subscriptions.publish([signal(1)])
    subscriptions.close()
    assert (await listener.receive()).detected_at == 1
    with pytest.raises(trio.EndOfChannel):
        await listener.receive()
    listener.close()


async def test_streams_opened_after_the_end_end_at_once():
    subscriptions = Subscriptions()
    listener = subscriptions.open("t")
    subscriptions.close()
    subscriptions.publish([signal(1)])
    with pytest.raises(trio.EndOfChannel):
        await listener.receive()
    late = subscriptions.open("t")
    with trio.fail_after(60), pytest.raises(trio.EndOfChannel):
        await late.receive()
