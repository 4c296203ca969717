"""The alerts of a cluster, in the bucket that query nodes share.

One query node at a time, which has the duty, follows the signals and changes the alerts; all show
them. An alert is one key. It is saved with the position, a sequence for each partition, up to which
it contains the signals; the progress, another key, is saved after the alerts. So whoever takes over
reads on from the progress and leaves out what an alert contains already
(docs/decisions/0042-query-nodes-share-their-work.md).

An alert that begins, ends or was accepted by a destination is saved at once. Counts are saved a few
seconds later, because they can be read again.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
import trio

from betrace.service.cluster.duty import Duty
from betrace.service.cluster.query.sending import SharedProgress, read_sequences
from betrace.service.signals import Signal
from betrace.service.storage.alert_store import AlertKey, AlertStore, AlertStoreError
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict, Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable

R = TypeVar("R")

_log = logging.getLogger("service.alerts")

PREFIX = "alerts."
PROGRESS = "alerts-progress"
_KEYS = "alerts"  # what all of these keys begin with
COUNTS_SECONDS = 5.0
"""How long changed counts may wait to be saved."""


def alert_bucket_key(key: AlertKey) -> str:
    """The bucket's key of an alert. Rule ids may have dots where the servers accept none."""
    tenant, rule = key
    return f"{PREFIX}{tenant}.{hashlib.sha256(rule.encode()).hexdigest()[:16]}"


class SharedAlerts:
    """Implements :class:`betrace.service.storage.alert_store.SavedAlerts`. Make it on the Trio
    thread; the methods that block are for other threads.

    When another node has changed an alert, this one doubts that it has the ``duty``. ``before`` has
    the alerts that this node kept on its own with an earlier version, and ``begin`` the sequences
    up to which its ledger has the signals; both count only if the bucket has no progress yet.
    """

    def __init__(
        self,
        bucket: ConfigBucket,
        duty: Duty,
        before: AlertStore,
        begin: dict[str, int] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._duty = duty
        self._before = before
        self._begin = begin
        self._clock = clock
        self._token = trio.lowlevel.current_trio_token()
        self._writer = uuid.uuid4().hex
        self._shared = SharedProgress(bucket, PROGRESS)
        self._seen: dict[AlertKey, bytes] = {}  # what the watch has shown
        # Of the duty:
        self._active = False
        self._loaded: dict[AlertKey, bytes] = {}
        self._contained: dict[AlertKey, dict[str, int]] = {}
        self._revisions: dict[AlertKey, int] = {}
        self._news: dict[AlertKey, Any] = {}
        self._waiting: dict[AlertKey, bytes | None] = {}
        self._upto: dict[str, int] = {}
        self._saved_upto: dict[str, int] = {}
        self._next_save = 0.0

    # What all nodes show

    async def watch(self) -> None:
        """Follow the alerts of the bucket until cancelled."""
        keys: dict[str, AlertKey] = {}
        async for entry in self._bucket.watch(PREFIX):
            found = _read(entry)
            if found is not None:
                keys[entry.key] = found.key
                self._seen[found.key] = found.alert
            elif entry.key in keys:
                self._seen.pop(keys.pop(entry.key), None)

    def shown(self, tenant: str) -> dict[AlertKey, bytes] | None:
        """The alerts of a tenant; None while this node has the duty, because then it has them in
        memory."""
        if self._active and self._duty.held:
            return None
        return {key: alert for key, alert in list(self._seen.items()) if key[0] == tenant}

    # What the node with the duty does

    @property
    def pending(self) -> bool:
        """Whether counts wait to be saved."""
        return bool(self._waiting)

    def progress(self) -> dict[str, int] | None:
        """How far the streams were followed, and with it all alerts, as of this moment."""
        return self._call(self._load)

    def alerts(self) -> dict[AlertKey, bytes]:
        """The alerts as of the last call of :meth:`progress`."""
        return dict(self._loaded)

    def unknown(self, queue: str, signals: list[tuple[int, Signal]]) -> list[Signal]:
        """The signals that their alert did not contain when this node took over."""
        return [
            signal
            for number, signal in signals
            if number > self._contained.get((signal.tenant, signal.rule_id), {}).get(queue, 0)
        ]

    def save(
        self, alerts: Mapping[AlertKey, bytes | None], progress: Mapping[str, int] | None = None
    ) -> None:
        """Save what must not be lost now, and the rest within :data:`COUNTS_SECONDS`."""
        self._call(lambda: self._save(alerts, progress or {}))

    def _call(self, work: Callable[[], Awaitable[R]]) -> R:
        try:
            return trio.from_thread.run(work, trio_token=self._token)
        except NatsUnavailable as error:
            raise AlertStoreError(f"the alerts cannot be read or saved now: {error}") from error

    async def _load(self) -> dict[str, int] | None:
        """Read everything anew."""
        progress = await self._bucket.get(PROGRESS)
        entries = await self._bucket.entries(_KEYS)
        revisions = [each.revision for each in entries if each.key == PROGRESS]
        if progress is not None and max(revisions, default=0) < progress.revision:
            raise NatsUnavailable("a replica of the bucket is behind")
        self._loaded, self._contained = {}, {}
        self._revisions, self._news, self._waiting = {}, {}, {}
        for entry in entries:
            alert = _read(entry) if entry.key.startswith(PREFIX) else None
            if alert is not None:
                key = alert.key
                self._loaded[key], self._contained[key] = alert.alert, alert.upto
                self._revisions[key], self._news[key] = entry.revision, _news(alert.alert)
        found = None if progress is None else read_sequences(progress.value)
        if found is None and self._begin is not None:
            found = self._begin
            self._loaded = await trio.to_thread.run_sync(self._before.alerts)
        self._upto, self._saved_upto = dict(found or {}), dict(found or {})
        self._next_save = 0.0
        self._active = True
        return found

    async def _save(
        self, alerts: Mapping[AlertKey, bytes | None], progress: Mapping[str, int]
    ) -> None:
        self._upto |= progress
        self._waiting |= alerts
        gone = [key for key, alert in self._waiting.items() if alert is None]
        everything = bool(gone) or self._clock() >= self._next_save
        for key, alert in list(self._waiting.items()):
            if alert is None:
                continue
            news = _news(alert)
            if everything or self._news.get(key) != news:
                await self._put(key, alert)
                self._news[key] = news
                del self._waiting[key]
        if not everything:
            return
        if self._upto != self._saved_upto:
            await self._shared.save(self._upto)
            self._saved_upto = dict(self._upto)
        for key in gone:  # after the progress, so that their signals do not start them again
            await self._remove(key)
            self._news.pop(key, None)
            del self._waiting[key]
        self._next_save = self._clock() + COUNTS_SECONDS

    async def _put(self, key: AlertKey, alert: bytes) -> None:
        value = orjson.dumps(
            {
                "key": key,
                "writer": self._writer,
                "upto": self._upto,
                "alert": orjson.Fragment(alert),
            }
        )

        async def put(revision: int) -> int:
            return await self._bucket.put(alert_bucket_key(key), value, revision)

        self._revisions[key] = await self._change(key, put)

    async def _remove(self, key: AlertKey) -> None:
        async def remove(revision: int) -> int:
            if revision:
                await self._bucket.delete(alert_bucket_key(key), revision)
            return 0

        await self._change(key, remove)
        self._revisions.pop(key, None)

    async def _change(self, key: AlertKey, change: Callable[[int], Awaitable[int]]) -> int:
        """Change an alert if nobody else has changed it since this node read or wrote it."""
        revision = self._revisions.get(key, 0)
        while True:
            try:
                return await change(revision)
            except Conflict:
                entry = await self._bucket.get(alert_bucket_key(key))
                found = None if entry is None else _read(entry)
                if found is not None and found.writer != self._writer:
                    self._duty.doubt()
                    raise AlertStoreError("another query node has changed an alert") from None
                # What this node sent before was stored, but the answer was lost.
                revision = 0 if entry is None else entry.revision


@dataclass(frozen=True, slots=True)
class _SharedAlert:
    """A value of the bucket: the alert, up to which sequences it contains the signals, and which
    process wrote it."""

    key: AlertKey
    alert: bytes
    upto: dict[str, int]
    writer: str


def _read(entry: Entry) -> _SharedAlert | None:
    """The alert; None if it was removed or is damaged."""
    if entry.value is None:
        return None
    try:
        value = orjson.loads(entry.value)
        tenant, rule = value["key"]
        alert = orjson.dumps(value["alert"])
        return _SharedAlert((tenant, rule), alert, dict(value["upto"]), value["writer"])
    except (LookupError, TypeError, ValueError) as error:
        _log.error("the alert %s in the bucket is damaged: %s", entry.key, error)
        return None


def _news(alert: bytes) -> Any:
    """What must be saved at once when it changes."""
    value = orjson.loads(alert)
    return [value.get(name) for name in ("started_ns", "ended_ns", "withdrawn", "delivered")]
