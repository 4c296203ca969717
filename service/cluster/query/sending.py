"""Sends exports and alerts once for the whole cluster.

For each destination one query node at a time has the duty to send. How far the destination is, a
sequence for each partition's ``OUT`` stream, is in the bucket that query nodes share. Whoever takes
the duty over continues there, so it repeats at most what was under way.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import orjson

from betrace.service.cluster.duty import Duties
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict

_log = logging.getLogger("service.query")

PROGRESS_PREFIX = "sent."


class SharedProgress:
    """How far a destination is: the key of the bucket. It never goes back, because a node that has
    lost the duty may still write to it: for each partition the higher sequence counts.

    A new key begins with ``begin``, if given: where this node's own file had it (see
    :class:`SharedTurns`).
    """

    def __init__(self, bucket: ConfigBucket, key: str, begin: dict[str, int] | None = None) -> None:
        self._bucket = bucket
        self._key = key
        self._begin = begin

    async def load(self) -> dict[str, int] | None:
        """The sequences by partition; None for a new destination, and if they are damaged. Raises
        :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`, as :meth:`save`."""
        entry = await self._bucket.get(self._key)
        return self._begin if entry is None else read_sequences(entry.value)

    async def save(self, done: dict[str, int]) -> None:
        """Note that everything up to these sequences was sent."""
        while True:
            entry = await self._bucket.get(self._key)
            known = (entry and read_sequences(entry.value)) or {}
            merged = known | {p: max(n, known.get(p, 0)) for p, n in done.items()}
            if entry is not None and merged == known:
                return
            try:
                revision = 0 if entry is None else entry.revision
                await self._bucket.put(self._key, orjson.dumps(merged), revision)
                return
            except Conflict:
                continue


def read_sequences(value: bytes | None) -> dict[str, int] | None:
    """Sequences by partition, as saved; None if they are damaged."""
    try:
        return {str(p): int(number) for p, number in orjson.loads(value or b"").items()}
    except (ValueError, TypeError, AttributeError) as error:
        _log.error("a progress in the bucket of query nodes is damaged: %s", error)
        return None


class SharedTurns:
    """Whose turn it is to send to each destination.

    ``begin`` says where exports begin that this node sent on its own before, with an earlier
    version: what is in its ledger counts as sent. It returns None for other destinations.
    """

    def __init__(
        self,
        bucket: ConfigBucket,
        duties: Duties,
        begin: Callable[[str], dict[str, int] | None] = lambda name: None,
    ) -> None:
        self._bucket = bucket
        self._duties = duties
        self._begin = begin

    async def perform(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` while this node has the duty."""
        await self._duties.get(name).perform(work)

    def progress(self, name: str) -> SharedProgress:
        """How far a destination is. From now on, this node wants its duty."""
        self._duties.get(name)
        return SharedProgress(self._bucket, PROGRESS_PREFIX + name, self._begin(name))
