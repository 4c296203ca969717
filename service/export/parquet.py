"""Writes one segment of the span log as one Parquet file, checks it, and moves it into place.

Layout: ``<directory>/tenant=<tenant>/date=<YYYY-MM-DD>/<segment>.parquet``. This is Hive
partitioning: query engines read ``tenant`` and ``date`` as columns. The date is the UTC day on
which the spans were received. Archiving a segment again replaces its file, so it is idempotent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from betrace.service.durable import replace_durably
from betrace.service.export.columns import SCHEMA, span_table
from betrace.service.otlp.columns import ERROR, SPAN_COUNT, SpanBatch
from betrace.service.storage.paths import tenant_archive
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import FILE_HEADER_BYTES, Frame, pack_position
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.segments import Segment

_BATCH_SPANS = 20_000
_SEGMENT_BYTES = b"betrace.segment_bytes"
_DAMAGED_BYTES = b"betrace.damaged_bytes"
_TEMPORARY = ".*.parquet.*.new"  # hidden from *.parquet


class ArchiveError(Exception):
    """A segment could not be archived; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Archived:
    """A file of the archive: ``spans`` rows from a segment of ``segment_bytes``, of which
    ``damaged_bytes`` were unreadable."""

    path: Path
    spans: int
    segment_bytes: int
    damaged_bytes: int


def parquet_path(directory: Path, tenant: str, segment: Segment) -> Path:
    """The path of a segment's file, whether or not it exists."""
    return tenant_archive(directory, tenant) / (
        f"date={segment.day.isoformat()}/{segment.number:08d}.parquet"
    )


def find_archived(directory: Path, tenant: str, segment: Segment) -> Archived | None:
    """The file with the segment's current content, or None."""
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


def delete_stale(directory: Path, tenant: str) -> None:
    """Delete a tenant's temporary files whose writer was killed.

    A file of a running process stays: ``betrace archive`` and the service may run together.
    """
    for path in tenant_archive(directory, tenant).glob(f"date=*/{_TEMPORARY}"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and int(owner) != os.getpid() and psutil.pid_exists(int(owner)):
            continue
        with suppress(OSError):
            path.unlink()


def archive_segment(
    directory: Path,
    log: SpanLog,
    tenant: str,
    segment: Segment,
    max_body_bytes: int,
    pause: Callable[[], None] = lambda: None,
    file: Path | None = None,
) -> Archived:
    """Write a segment's spans to ``file``, by default its :func:`parquet_path`; ``pause`` is called
    after each batch.

    The spans decoded from each frame must be as many as were accepted, and the file's rows as many
    as their sum.

    Raises:
      ArchiveError: the numbers differ, or the disk failed; the archive is unchanged.
    """
    path = file or parquet_path(directory, tenant, segment)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            spans, damaged = _write(temporary, log, tenant, segment, max_body_bytes, pause)
            if not segment.path.exists():
                raise ArchiveError(f"segment {segment.number} of tenant {tenant} was deleted")
            written = _describe(temporary)
            if written.spans != spans:
                raise ArchiveError(
                    f"{temporary} has {written.spans} rows instead of {spans}; check the disk"
                )
            replace_durably(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except (OSError, pa.ArrowException) as error:
        raise ArchiveError(
            f"segment {segment.number} of tenant {tenant} cannot be archived in {directory}: "
            f"{error}. Check the directory's permissions, free space and disk"
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
    """Return the number of spans written and of unreadable bytes."""
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
    """Yield the positions and frames of a segment, about ``_BATCH_SPANS`` spans at a time."""
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
                f"the request at log position {batch.positions[number]} of tenant {tenant} has "
                f"{counted[number]} spans instead of the {frame.spans} that were accepted. Its "
                "segment stays in the log. This is a bug: please report it"
            )
