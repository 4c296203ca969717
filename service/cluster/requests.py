"""Messages of the cluster's processes to one another on NATS subjects, and answers to requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.nats import Nats

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_log = logging.getLogger("service.cluster")

Answer = Callable[[str, bytes], bytes | None]
"""The answer to a request, given its subject and data; None if another process should answer. It
may block."""

RETRY_SECONDS = 1.0


async def serve_requests(client: NatsClient, subject: str, queue: str, answer: Answer) -> None:
    """Answer requests one after another, until cancelled. Processes with the same ``queue`` share
    the requests; without one, each process gets all of them."""
    pool = ThreadPoolExecutor(1, subject)

    async def reply(message: Msg) -> None:
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(pool, answer, message.subject, message.data)
            if found is not None:
                await message.respond(found)
        except Exception as error:  # the next request may work; nats-py would only log it
            _log.warning("a request on %s was not answered: %s", message.subject, error)

    try:
        async with subscribed(client, subject, reply, queue):
            await trio.sleep_forever()
    finally:
        pool.shutdown(wait=False)


@asynccontextmanager
async def subscribed(
    client: NatsClient, subject: str, receive: Callable[[Msg], Awaitable[None]], queue: str = ""
) -> AsyncIterator[None]:
    """Call ``receive`` in the client's thread for each message on a subject. Waits until NATS is
    available."""

    async def subscribe(nats: Nats) -> Subscription:
        return await nats.nc.subscribe(subject, queue=queue, cb=receive)

    while True:
        try:
            subscription = await client.call(subscribe)
            break
        except NatsUnavailable:
            await trio.sleep(RETRY_SECONDS)
    try:
        yield  # nats-py subscribes again when it reconnects
    finally:
        with trio.move_on_after(1, shield=True):
            try:
                await client.call(lambda nats: subscription.unsubscribe())
            except Exception as error:  # the connection is gone
                _log.debug("%s: %s", subject, error)
