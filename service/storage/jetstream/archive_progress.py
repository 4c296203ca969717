"""How far the archive of a cluster is, in the configuration bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta

import orjson

from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.times import day_ns

_KEY = "archive"


@dataclass(frozen=True, slots=True)
class ArchiveProgress:
    """Everything up to the end of ``day`` is archived; ``next`` has, by partition, the sequence of
    the first message that is not."""

    day: date
    next: Mapping[int, int]
    revision: int = 0

    @property
    def until_ns(self) -> int:
        """When ``day`` ended."""
        return day_ns(self.day + timedelta(days=1))


async def read_progress(config: ConfigBucket) -> ArchiveProgress | None:
    """The progress; None before the first day is archived. Raises
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    entry = await config.get(_KEY)
    if entry is None or not entry.value:
        return None
    value = orjson.loads(entry.value)
    found = {int(partition): int(sequence) for partition, sequence in value["next"].items()}
    return ArchiveProgress(date.fromisoformat(value["day"]), found, entry.revision)


async def write_progress(config: ConfigBucket, progress: ArchiveProgress) -> int:
    """Write the progress if nobody did after ``progress.revision``; returns the new revision.
    Raises :exc:`~betrace.service.storage.jetstream.bucket.Conflict` and
    :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
    value = {
        "day": progress.day.isoformat(),
        "next": {str(partition): each for partition, each in sorted(progress.next.items())},
    }
    return await config.put(_KEY, orjson.dumps(value), progress.revision)
