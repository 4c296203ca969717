"""Answers requests of other nodes (NATS request and reply)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import trio

from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.nats import Nats

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_RETRY_SECONDS = 1.0

Answer = Callable[[str, bytes], bytes | None]
"""Makes the answer to a request from its subject and its bytes; None means that another node
answers. Called in a thread of its own, so it may block."""


async def respond(client: NatsClient, subject: str, answer: Answer, queue: str = "") -> None:
    """Answer requests on ``subject`` until cancelled. The nodes that name the same ``queue`` share
    the requests; without one, each node gets every request."""
    pool = ThreadPoolExecutor(1, "respond")

    async def subscribe(nats: Nats) -> Subscription:
        loop = asyncio.get_running_loop()

        async def reply(message: Msg) -> None:
            found = await loop.run_in_executor(pool, answer, message.subject, message.data)
            if found is not None:
                await message.respond(found)

        return await nats.nc.subscribe(subject, queue=queue, cb=reply)

    subscription: Subscription | None = None
    try:
        while subscription is None:
            try:
                subscription = await client.call(subscribe)
            except NatsUnavailable:
                await trio.sleep(_RETRY_SECONDS)
        await trio.sleep_forever()
    finally:
        with trio.move_on_after(1, shield=True):
            if subscription is not None:
                await _unsubscribe(client, subscription)
        pool.shutdown(wait=False)


async def _unsubscribe(client: NatsClient, subscription: Subscription) -> None:
    async def work(nats: Nats) -> None:
        await subscription.unsubscribe()

    try:
        await client.call(work)
    except NatsUnavailable:
        return
