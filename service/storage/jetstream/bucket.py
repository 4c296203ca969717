"""Key-value buckets with compare-and-set, stored as ``nats kv`` stores them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import (
    NatsUnavailable,
    WrongLastSequence,
)
from betrace.service.storage.jetstream.nats import EXPECTED_SUBJECT_LAST, Nats, StoredMessage
from betrace.service.storage.jetstream.stream_log import poll
from betrace.service.storage.jetstream.wakeups import Wakeup

_OPERATION = "KV-Operation"
_WAIT_SECONDS = 60.0
_RETRY_SECONDS = 0.25
_READ_BYTES = 4 << 20


class Conflict(Exception):  # noqa: N818
    """The key has another revision than expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of a bucket; ``value`` is None if the key was deleted. Revisions of a bucket's keys
    only increase."""

    key: str
    value: bytes | None
    revision: int


class ConfigBucket:
    """A bucket. All methods raise :exc:`NatsUnavailable`; after a :meth:`put` or :meth:`delete`
    that did, the outcome is unknown."""

    def __init__(self, client: NatsClient, bucket: str) -> None:
        self._client = client
        self._stream = f"KV_{bucket}"
        self._prefix = f"$KV.{bucket}."

    async def get(self, key: str) -> Entry | None:
        """The key's latest value, as the leader has it; None if the key does not exist."""

        async def work(nats: Nats) -> Entry | None:
            entry = await self._latest(nats, key)
            return None if entry is None or entry.value is None else entry

        return await self._client.call(work)

    async def put(self, key: str, value: bytes, expected_revision: int | None = None) -> int:
        """Set the key and return its revision. With ``expected_revision``, only if the key has it
        (0: the key does not exist), or was deleted with it; otherwise raises :exc:`Conflict`."""
        return await self._put(key, value, {}, expected_revision)

    async def delete(self, key: str, expected_revision: int | None = None) -> int:
        """Delete the key and return the revision of that. Raises :exc:`Conflict` like
        :meth:`put`."""
        return await self._put(key, b"", {_OPERATION: "DEL"}, expected_revision)

    async def _put(
        self, key: str, value: bytes, headers: dict[str, str], expected: int | None
    ) -> int:
        async def work(nats: Nats) -> int:
            wanted = expected
            if wanted == 0:
                wanted = await self._deleted_revision(nats, key)
            more = {} if wanted is None else {EXPECTED_SUBJECT_LAST: str(wanted)}
            try:
                return await nats.publish(self._prefix + key, value, headers | more)
            except WrongLastSequence as error:
                raise Conflict(f"{key} was changed by another process") from error

        return await self._client.call(work)

    async def _deleted_revision(self, nats: Nats, key: str) -> int:
        """The revision of the deletion of a key, 0 if it never existed."""
        entry = await self._latest(nats, key)
        if entry is None:
            return 0
        if entry.value is not None:
            raise Conflict(f"{key} exists")
        return entry.revision

    async def _latest(self, nats: Nats, key: str) -> Entry | None:
        """The latest value or deletion of a key, as the leader has it."""
        found = await nats.leader_get(self._stream, {"last_by_subj": self._prefix + key})
        return None if found is None else self._entry(found)

    async def entries(self, prefix: str = "") -> list[Entry]:
        """The latest values of the keys that exist and begin with ``prefix``, ordered by revision.
        A replica that is behind may return earlier ones."""
        found: dict[str, Entry] = {}
        after = 0
        while batch := await self._after(after, prefix):
            found.update({entry.key: entry for entry in batch})
            after = batch[-1].revision
        entries = (entry for entry in found.values() if entry.value is not None)
        return sorted(
            (entry for entry in entries if entry.key.startswith(prefix)),
            key=lambda entry: entry.revision,
        )

    async def watch(self, prefix: str = "") -> AsyncIterator[Entry]:
        """First the latest entries of the keys that begin with ``prefix``, deletions included, then
        every change; of quick changes of a key perhaps only the last. While the servers are
        unavailable, it waits."""
        after = 0
        while True:
            try:
                batch = await self._after(after, prefix, _WAIT_SECONDS)
            except NatsUnavailable:
                await trio.sleep(_RETRY_SECONDS)
                continue
            for entry in batch:
                after = entry.revision
                if entry.key.startswith(prefix):
                    yield entry

    async def _after(self, after: int, prefix: str, wait_seconds: float = 0) -> list[Entry]:
        """Entries of keys that begin with ``prefix``, and perhaps others."""
        keys = f"{self._prefix}{prefix if prefix.endswith('.') else ''}>"

        async def work(nats: Nats) -> list[Entry]:
            async def read() -> list[Entry]:
                body = {"seq": after + 1, "next_by_subj": keys}
                return [
                    self._entry(each)
                    for each in await nats.get_many(self._stream, body, _READ_BYTES)
                ]

            return await poll(nats, Wakeup(keys), wait_seconds, read)

        return await self._client.call(work, None)

    def _entry(self, message: StoredMessage) -> Entry:
        gone = message.headers.get(_OPERATION) in ("DEL", "PURGE")
        return Entry(
            message.subject.removeprefix(self._prefix),
            None if gone else message.data,
            message.sequence,
        )
