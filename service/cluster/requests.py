"""Answers requests on a NATS subject, for as long as a process of the cluster runs."""

from __future__ import annotations

import asyncio
import logging
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

_log = logging.getLogger("service.cluster")

Answer = Callable[[str, bytes], bytes | None]
"""The answer to a request, given its subject and data; None if another process should answer. It
may block."""

RETRY_SECONDS = 1.0


async def serve_requests(client: NatsClient, subject: str, queue: str, answer: Answer) -> None:
    """Answer requests one after another, until cancelled. Processes with the same ``queue`` share
    the requests; without one, each process gets all of them."""
    pool = ThreadPoolExecutor(1, subject)

    async def subscribe(nats: Nats) -> Subscription:
        loop = asyncio.get_running_loop()

        async def reply(message: Msg) -> None:
            try:
                found = await loop.run_in_executor(pool, answer, message.subject, message.data)
                if found is not None:
                    await message.respond(found)
            except Exception as error:  # the next request may work; nats-py would only log it
                _log.warning("a request on %s was not answered: %s", message.subject, error)

        return await nats.nc.subscribe(subject, queue=queue, cb=reply)

    while True:
        try:
            subscription = await client.call(subscribe)
            break
        except NatsUnavailable:
            await trio.sleep(RETRY_SECONDS)

    async def unsubscribe(nats: Nats) -> None:
        await subscription.unsubscribe()

    try:
        await trio.sleep_forever()  # nats-py subscribes again when it reconnects
    finally:
        with trio.move_on_after(1, shield=True):
            try:
                await client.call(unsubscribe)
            except NatsUnavailable as error:
                _log.debug("%s: %s", subject, error)
        pool.shutdown(wait=False)
