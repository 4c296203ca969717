"""The filter of closed traces as a file, so that a restart remembers them.

Format: magic, u64 length of a header in JSON (:meth:`ClosedTraces.saved`, and when it was saved),
the header, the bits, and u32 CRC-32 of all before. The file may be older than a checkpoint: the
traces closed since then are in the trace index.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from isal.isal_zlib import crc32

from betrace.service.durable import replacing
from betrace.service.otlp.columns import Rows
from betrace.service.traces.late_filter import ClosedTraces

_MAGIC = b"BTLATE1\n"
_HEAD = struct.Struct("<8sQ")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class SavedFilter:
    """A copy of the filter, and when it was made (nanoseconds since 1970)."""

    taken_ns: int
    about: dict[str, Any]
    bits: Rows

    @classmethod
    def of(cls, closed: ClosedTraces, taken_ns: int) -> SavedFilter:
        """A copy. The caller holds the lock of the traces."""
        return cls(taken_ns, closed.saved(), closed.filters.copy())


def write_filter(path: Path, saved: SavedFilter) -> None:
    """Replace the file durably; only its owner may read it, because it has the filter's secret.
    Raises :exc:`OSError`."""
    about = {**saved.about, "taken_ns": saved.taken_ns, "words": saved.bits.shape[1]}
    header = orjson.dumps(about)
    parts: list[bytes | memoryview] = [
        _HEAD.pack(_MAGIC, len(header)),
        header,
        saved.bits.data.cast("B"),
    ]
    crc = 0
    with replacing(path) as file:
        path.with_name(path.name + ".new").chmod(0o600)
        for part in parts:
            crc = crc32(part, crc)
            file.write(part)
        file.write(_CRC.pack(crc))


def read_filter(path: Path, words: int) -> SavedFilter | None:
    """The filter in a file; None if the file is missing or damaged, or has another size."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _HEAD.size + _CRC.size:
        return None
    magic, length = _HEAD.unpack_from(data)
    if magic != _MAGIC or crc32(memoryview(data)[: -_CRC.size]) != _CRC.unpack(data[-4:])[0]:
        return None
    about = orjson.loads(data[_HEAD.size : _HEAD.size + length])
    if about.pop("words") != words:
        return None  # traces.late_filter_bytes was changed
    bits = np.frombuffer(data, np.int64, 2 * words, _HEAD.size + length).reshape(2, words)
    return SavedFilter(about.pop("taken_ns"), about, bits)
