"""One segment of the span log as one Parquet file: written, checked, and then put in its place.

Layout: ``<directory>/tenant=<tenant>/date=<YYYY-MM-DD>/<segment>.parquet``, Hive's way of
partitioning, which engines turn into the columns ``tenant`` and ``date``. The date is the day, in
UTC, on which the spans were received. A segment that is archived again replaces its file, so doing
work twice changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from betrace.service.durable import replace_durably
from betrace.service.export.columns import SCHEMA, span_table
from betrace.service.otlp.columns import ERROR, SPAN_COUNT, SpanBatch
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import FILE_HEADER_BYTES, Frame, pack_position
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.tenant_log import Segment

_BATCH_SPANS = 20_000
_SEGMENT_BYTES = b"betrace.segment_bytes"
_DAMAGED_BYTES = b"betrace.damaged_bytes"


class ArchiveError(Exception):
    """A segment cannot be archived; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Archived:
    """A file of the archive: ``spans`` rows of a segment of ``segment_bytes``, of which
    ``damaged_bytes`` could not be read."""

    path: Path
    spans: int
    segment_bytes: int
    damaged_bytes: int


def parquet_path(directory: Path, tenant: str, segment: Segment) -> Path:
    """Where a segment's file is, or would be."""
    return tenant_archive(directory, tenant) / (
        f"date={segment.day.isoformat()}/{segment.number:08d}.parquet"
    )


def tenant_archive(directory: Path, tenant: str) -> Path:
    """The folder of a tenant's files."""
    return directory / f"tenant={tenant}"


def find_archived(directory: Path, tenant: str, segment: Segment) -> Archived | None:
    """The file that holds all of the segment as it is now, None where there is none."""
    path = parquet_path(directory, tenant, segment)
    try:
        found = _describe(path)
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return found if found.segment_bytes == segment.bytes else None


def _describe(path: Path) -> Archived:
    with pq.ParquetFile(path) as file:
        about = file.metadata.metadata or {}
        return Archived(
            path, file.metadata.num_rows, int(about[_SEGMENT_BYTES]), int(about[_DAMAGED_BYTES])
        )


def archive_segment(
    directory: Path,
    log: SpanLog,
    tenant: str,
    segment: Segment,
    max_body_bytes: int,
    pause: Callable[[], None] = lambda: None,
) -> Archived:
    """Write a segment's spans; ``pause`` is called now and then between the work.

    Every frame's number of accepted spans is compared with what was decoded, and the file's rows
    with the sum. Raises :exc:`ArchiveError` where they differ or the disk fails; then the
    archive is as before.
    """
    path = parquet_path(directory, tenant, segment)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")  # hidden from *.parquet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            spans, damaged = _write(temporary, log, tenant, segment, max_body_bytes, pause)
            if not segment.path.exists():
                raise ArchiveError(f"segment {segment.number} of tenant {tenant} was deleted")
            written = _describe(temporary)
            if written.spans != spans:
                raise ArchiveError(
                    f"{temporary} has {written.spans} rows instead of {spans}: check the disk"
                )
            replace_durably(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(
            f"segment {segment.number} of tenant {tenant} cannot be archived in {directory} "
            f"({error}): check its permissions, free space and health"
        ) from error
    return Archived(path, spans, segment.bytes, damaged)


def _write(
    path: Path,
    log: SpanLog,
    tenant: str,
    segment: Segment,
    max_body_bytes: int,
    pause: Callable[[], None],
) -> tuple[int, int]:
    """The spans written, and the bytes of the segment that could not be read."""
    spans = 0
    readable = FILE_HEADER_BYTES
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for positions, frames in _frames(log, tenant, segment):
            batch = read_frames(tenant, positions, frames, max_body_bytes)
            _compare(tenant, batch, frames)
            received = np.array([frame.received_ns for frame in frames], np.int64)
            writer.write_table(span_table(batch, received))
            spans += len(batch)
            readable += sum(frame.stored_bytes for frame in frames)
            pause()
        damaged = segment.bytes - readable
        writer.add_key_value_metadata(
            {_SEGMENT_BYTES: str(segment.bytes), _DAMAGED_BYTES: str(damaged)}
        )
    return spans, damaged


def _frames(log: SpanLog, tenant: str, segment: Segment) -> Iterator[tuple[list[int], list[Frame]]]:
    """The segment's frames, some at a time."""
    positions: list[int] = []
    frames: list[Frame] = []
    spans = 0
    start = pack_position(segment.number, 0)
    for position, frame in log.frames(tenant, start, pack_position(segment.number, segment.bytes)):
        positions.append(position)
        frames.append(frame)
        spans += frame.spans
        if spans >= _BATCH_SPANS:
            yield positions, frames
            positions, frames, spans = [], [], 0
    if frames:
        yield positions, frames


def _compare(tenant: str, batch: SpanBatch, frames: list[Frame]) -> None:
    counted = batch.bodies[:, SPAN_COUNT]
    for number, frame in enumerate(frames):
        if batch.bodies[number, ERROR] or counted[number] != frame.spans:
            raise ArchiveError(
                f"a request of tenant {tenant} in the log, at {batch.positions[number]}, has "
                f"{counted[number]} spans instead of the {frame.spans} that were accepted: its "
                "segment is kept; report this"
            )
