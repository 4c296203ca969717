"""Forwards what reached the log of a former partition after its seal.

An edge that has not heard of a change yet appends to the former partitions. Its spans are as safe
there as elsewhere, but nobody evaluates them, so the owner of a current partition appends them to
the partitions that they belong to now. A straggler may be forwarded twice, by two owners or after a
restart; its spans count once.
"""

from __future__ import annotations

import logging

import trio

from betrace.channels import TransientError
from betrace.service.cluster.evaluator.parts import OwnerParts
from betrace.service.otlp.split import TooMuchCopied, split
from betrace.service.otlp.wire import scan_bodies
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.envelope import (
    EnvelopeCorrupt,
    Spans,
    TenantFrame,
    pack,
    unpack,
)
from betrace.service.storage.jetstream.errors import JetStreamError, LogGap
from betrace.service.storage.jetstream.generations import Generation
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.tenants import split_log_name

_log = logging.getLogger("service.cluster.owner")

BUSY_SECONDS = 600.0
"""A former log is watched closely for this long after a straggler or the start."""
_WAIT_SECONDS = 5.0
_REST_SECONDS = 30.0
_RETRY_SECONDS = 0.5
_READ_BYTES = 1 << 20
_PART_BYTES = 1 << 19


def forwarded_key(partition: int) -> str:
    """The key with the last message of a former log that was forwarded."""
    return f"forwarded.{partition}"


async def forward_stragglers(parts: OwnerParts, partition: int) -> None:
    """Look after the former partitions whose place a current one has, until cancelled."""
    async with trio.open_nursery() as nursery:
        for former in parts.partitions.generations.former(partition):
            nursery.start_soon(_follow, parts, former)


async def _follow(parts: OwnerParts, former: int) -> None:
    while former not in parts.partitions.finished:
        await parts.partitions.changed.wait()
    after = max(parts.partitions.finished[former].sealed, await _forwarded(parts.config, former))
    busy_until = trio.current_time() + BUSY_SECONDS
    while True:
        busy = trio.current_time() < busy_until
        try:
            wait = _WAIT_SECONDS if busy else 0.0
            messages = await parts.spans.read(former, after, _READ_BYTES, wait)
            for message in messages:
                await _forward(parts, former, message)
                after = message.sequence
            if messages:
                await parts.config.put(forwarded_key(former), b"%d" % after)
                busy_until = trio.current_time() + BUSY_SECONDS
        except LogGap as gap:
            after = gap.found - 1
        except (TransientError, JetStreamError) as error:
            _log.debug("stragglers of partition %d wait: %s", former, error)
            await trio.sleep(_RETRY_SECONDS)
        else:
            if not busy and not messages:
                await trio.sleep(_REST_SECONDS)


async def _forwarded(config: ConfigBucket, former: int) -> int:
    while True:
        try:
            entry = await config.get(forwarded_key(former))
        except TransientError:
            await trio.sleep(_RETRY_SECONDS)
        else:
            return int(entry.value) if entry is not None and entry.value else 0


async def _forward(parts: OwnerParts, former: int, message: LogMessage) -> None:
    current = parts.partitions.current
    found = await parts.threads.run(split_again, message, current)
    for number, (partition, data) in enumerate(found):
        message_id = f"{former}-{message.sequence}-forwarded-{current.first}-{number}"
        await parts.spans.append(partition, data, message_id)
    if found:
        _log.info("forwarded message %d of the former partition %d", message.sequence, former)


def split_again(message: LogMessage, current: Generation) -> list[tuple[int, bytes]]:
    """The spans of a message as messages for the current partitions. What cannot be read, and what
    has no spans, is left out."""
    try:
        content = unpack(message.data)
    except EnvelopeCorrupt as error:
        _log.error("message %d after a seal cannot be read: %s", message.sequence, error)
        return []
    found: list[tuple[int, bytes]] = []
    for frame in content.frames if isinstance(content, Spans) else ():
        tenant, _ = split_log_name(frame.tenant)
        batch = scan_bodies(tenant, [frame.body])
        try:
            most = max(_PART_BYTES, len(frame.body))  # each span fits into a message, as it did
            parts, _ = split(batch, current.count, most, current.first)
        except TooMuchCopied:
            _log.error("message %d after a seal is too large to be split", message.sequence)
            continue
        for part in parts:
            again = TenantFrame(frame.tenant, frame.received_ns, part.spans, part.body)
            found.append((part.partition, pack(Spans([again]))))
    return found
