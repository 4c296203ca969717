"""Large values in an object store, laid out as ``nats object`` lays it out: chunks under one
subject, and a description with their digest under another, which makes the object visible."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import uuid
from datetime import UTC, datetime
from typing import Any

import orjson

from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.nats import MESSAGE_ID, Nats, server_time_ns
from betrace.service.storage.jetstream.stream_log import ATTEMPT_SECONDS, Retries

_CHUNK_BYTES = 256 << 10
_IN_FLIGHT = 4
_READ_BYTES = 8 << 20
_NUMBER = "BeTrace-Chunk"  # attempts may be stored in another order
_ROLLUP = {"Nats-Rollup": "sub"}
_TRIES = 20  # of a replica that is behind
_RETRY_SECONDS = 0.1
_SECONDS = 120.0  # per operation


class BlobMissing(LookupError):  # noqa: N818
    """There is no blob of this name."""


class BlobCorrupt(ValueError):  # noqa: N818
    """The blob's bytes are not those that were stored."""


class Blobs:
    """The blobs of an object store. All methods raise :exc:`NatsUnavailable`, :meth:`put` also
    :exc:`StreamFull`; a blob whose :meth:`put` failed is either invisible or complete."""

    def __init__(self, client: NatsClient, store: str) -> None:
        self._client = client
        self._stream = f"OBJ_{store}"
        self._chunks = f"$O.{store}.C."
        self._descriptions = f"$O.{store}.M."

    async def put(self, name: str, data: bytes) -> None:
        """Store ``data`` as ``name``, in place of what had this name."""

        async def work(nats: Nats) -> None:
            before = await self._find(nats, name)
            number = uuid.uuid4().hex
            chunks = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)]
            await self._put_chunks(nats, self._chunks + number, chunks)
            description = {
                "name": name,
                "nuid": number,
                "size": len(data),
                "chunks": len(chunks),
                "digest": _digest(data),
                "mtime": datetime.now(UTC).isoformat(),
            }
            await self._write(nats, self._subject(name), orjson.dumps(description), _ROLLUP)
            if before is not None:
                await self._purge(nats, self._chunks + before["nuid"])

        await self._client.call(work, _SECONDS)

    async def get(self, name: str) -> bytes:
        """The blob. Raises :exc:`BlobMissing` and :exc:`BlobCorrupt`."""

        async def work(nats: Nats) -> bytes:
            found = await self._find(nats, name)
            if found is None:
                raise BlobMissing(f"there is no blob {name} in {self._stream}")
            for _ in range(_TRIES):
                chunks = await self._get_chunks(nats, self._chunks + found["nuid"])
                if len(chunks) >= found["chunks"]:
                    break
                await asyncio.sleep(_RETRY_SECONDS)
            data = b"".join(chunks)
            if len(data) != found["size"] or _digest(data) != found["digest"]:
                raise BlobCorrupt(
                    f"the blob {name} in {self._stream} is damaged: {len(data)} of "
                    f"{found['size']} bytes, and the digest differs"
                )
            return data

        return await self._client.call(work, _SECONDS)

    async def delete(self, name: str) -> None:
        """Delete the blob, if there is one."""

        async def work(nats: Nats) -> None:
            found = await self._find(nats, name)
            if found is not None:
                await self._purge(nats, self._subject(name))
                await self._purge(nats, self._chunks + found["nuid"])

        await self._client.call(work, _SECONDS)

    async def names(self, prefix: str = "") -> list[str]:
        """The names of the blobs that begin with ``prefix``, sorted."""

        async def work(nats: Nats) -> list[str]:
            subjects, _ = await self._subjects(nats, self._descriptions)
            return [
                base64.urlsafe_b64decode(each.removeprefix(self._descriptions)).decode()
                for each in subjects
            ]

        return sorted(name for name in await self._client.call(work) if name.startswith(prefix))

    async def delete_orphans(self, seconds: float) -> int:
        """Delete chunks that belong to no blob, because their :meth:`put` was interrupted at least
        ``seconds`` ago; returns how many blobs they belonged to."""

        async def work(nats: Nats) -> int:
            found, now_ns = await self._subjects(nats, self._chunks)
            before_ns = now_ns - int(seconds * 1e9)
            orphans = found - await self._chunks_in_use(nats)
            deleted = 0
            for subject in sorted(orphans):
                last = await nats.leader_get(self._stream, {"last_by_subj": subject})
                if last is not None and last.time_ns < before_ns:
                    await self._purge(nats, subject)
                    deleted += 1
            return deleted

        return await self._client.call(work, _SECONDS)

    async def _chunks_in_use(self, nats: Nats) -> set[str]:
        """The subjects of all blobs' chunks, as the leader knows them: a replica may be behind."""
        found: set[str] = set()
        for subject in (await self._subjects(nats, self._descriptions))[0]:
            last = await nats.leader_get(self._stream, {"last_by_subj": subject})
            if last is not None:
                found.add(self._chunks + str(orjson.loads(last.data)["nuid"]))
        return found

    async def _subjects(self, nats: Nats, prefix: str) -> tuple[set[str], int]:
        """The subjects below ``prefix`` that have messages, and the server's time."""
        info = await nats.api(f"STREAM.INFO.{self._stream}", {"subjects_filter": f"{prefix}>"})
        return set(info["state"].get("subjects") or {}), server_time_ns(info["ts"])

    def _subject(self, name: str) -> str:
        return self._descriptions + base64.urlsafe_b64encode(name.encode()).decode()

    async def _find(self, nats: Nats, name: str) -> dict[str, Any] | None:
        found = await nats.leader_get(self._stream, {"last_by_subj": self._subject(name)})
        if found is None:
            return None
        try:
            description: dict[str, Any] = orjson.loads(found.data)
        except orjson.JSONDecodeError as error:
            raise BlobCorrupt(f"the description of the blob {name} is damaged") from error
        return None if description.get("deleted") else description

    async def _put_chunks(self, nats: Nats, subject: str, chunks: list[bytes]) -> None:
        slots = asyncio.Semaphore(_IN_FLIGHT)

        async def put(number: int, chunk: bytes) -> None:
            async with slots:
                await self._write(nats, subject, chunk, {_NUMBER: str(number)})

        try:
            async with asyncio.TaskGroup() as tasks:
                for number, chunk in enumerate(chunks):
                    tasks.create_task(put(number, chunk))
        except ExceptionGroup as group:  # callers catch what this class documents
            raise group.exceptions[0] from group

    async def _get_chunks(self, nats: Nats, subject: str) -> list[bytes]:
        chunks: dict[int, bytes] = {}
        after = 0
        while True:
            body = {"seq": after + 1, "next_by_subj": subject}
            messages = await nats.get_many(self._stream, body, _READ_BYTES)
            if not messages:
                return [chunks[number] for number in sorted(chunks)]
            for message in messages:
                chunks[int(message.headers.get(_NUMBER, len(chunks)))] = message.data
            after = messages[-1].sequence

    async def _write(self, nats: Nats, subject: str, data: bytes, headers: dict[str, str]) -> None:
        retries = Retries()
        headers = headers | {MESSAGE_ID: uuid.uuid4().hex}
        while True:
            try:
                await nats.publish(subject, data, headers, ATTEMPT_SECONDS)
            except NatsUnavailable as error:
                await retries.pause(self._stream, error)
            else:
                return

    async def _purge(self, nats: Nats, subject: str) -> None:
        await nats.api(f"STREAM.PURGE.{self._stream}", {"filter": subject})


def _digest(data: bytes) -> str:
    return f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()}"
