"""Snapshots of a partition as bytes: everything that its future depends on.

A snapshot is a zstd frame with a checksum. It contains the lengths of the header and of the traces,
the header (JSON), the traces (:mod:`betrace.service.traces.checkpoint`), and the bits of the filter
of closed traces.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import zstandard

from betrace.service.otlp.columns import Rows
from betrace.service.traces import checkpoint
from betrace.service.traces.checkpoint import Snapshot

_FORMAT = 3
_FORMER = 2  # the rules' versions had sequences instead of positions
_LENGTHS = struct.Struct("<QQ")
_LEVEL = 1


@dataclass(frozen=True, slots=True)
class PartitionSnapshot:
    """The traces, the filter of closed ones, and the rest as JSON."""

    header: dict[str, Any]
    traces: Snapshot
    filters: Rows

    @property
    def rules_by_sequence(self) -> bool:
        """Whether the rules' versions have sequences of the log instead of positions."""
        return bool(self.header.get("format", _FORMAT) == _FORMER)


def encode(snapshot: PartitionSnapshot) -> bytes:
    """The snapshot as bytes."""
    header = orjson.dumps({"format": _FORMAT, **snapshot.header})
    traces = checkpoint.encode(snapshot.traces)
    lengths = _LENGTHS.pack(len(header), sum(map(len, traces)))
    parts = [lengths, header, *traces, np.ascontiguousarray(snapshot.filters).data.cast("B")]
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    stream = compressor.compressobj(size=sum(map(len, parts)))
    return b"".join([*map(stream.compress, parts), stream.flush()])


def decode(data: bytes) -> PartitionSnapshot:
    """The inverse of :func:`encode`. Raises ValueError for other bytes."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data)
        header_length, traces_length = _LENGTHS.unpack_from(raw)
        at = _LENGTHS.size + header_length
        header = orjson.loads(raw[_LENGTHS.size : at])
        if header["format"] not in (_FORMAT, _FORMER):
            raise LookupError(f"it has format {header['format']}, expected {_FORMAT}")
        traces = checkpoint.decode(memoryview(raw)[at : at + traces_length])
        filters = np.frombuffer(raw, np.int64, offset=at + traces_length).reshape(2, -1)
    except (zstandard.ZstdError, struct.error, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the snapshot is damaged: {error}") from error
    return PartitionSnapshot(header, traces, filters)
