"""Checks the blocks of a DuckDB file without DuckDB, so that damage is found in parts that no query
reads.

The format (DuckDB's ``src/storage``): three headers of 4 KiB, then blocks whose size is in the
second and third header, usually 256 KiB. Headers and blocks begin with a checksum of their rest,
whose words are multiplied with a constant and combined with XOR. A file whose headers do not have
such checksums is of another version, and is not checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEADER_BYTES = 4096
_HEADERS = 3
_MAGIC = b"DUCK"
_CHECKSUM = struct.Struct("<Q")
_BLOCK_SIZE = struct.Struct("<40xQ")
_LEAST_BLOCK, _MOST_BLOCK = 4096, 1 << 22
_SEED = 5381
_FACTOR = np.uint64(0xBF58476D1CE4E5B9)


def checked_blocks(path: Path) -> Iterator[tuple[int, int, bool]]:
    """The offset and size of each block of a file, and whether its checksum is right. A block that
    is being written may look wrong. Raises :exc:`OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = _block_size(descriptor)
        if size is None:
            return
        offset = _HEADERS * _HEADER_BYTES
        while len(block := os.pread(descriptor, size, offset)) == size:
            right = _is_right(block) or not any(block)  # the file may have been extended
            # The file is not read again soon, and others need the memory.
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
            yield offset, size, right
            offset += size
    finally:
        os.close(descriptor)


def _block_size(descriptor: int) -> int | None:
    """The size of the file's blocks; None if its format is not known."""
    found = None
    for number in range(_HEADERS):
        header = os.pread(descriptor, _HEADER_BYTES, number * _HEADER_BYTES)
        if len(header) < _HEADER_BYTES or (number == 0 and header[8:12] != _MAGIC):
            return None
        if not _is_right(header):
            continue  # one of the two may be being written
        if number:
            (found,) = _BLOCK_SIZE.unpack_from(header)
    return found if found is not None and _LEAST_BLOCK <= found <= _MOST_BLOCK else None


def _is_right(data: bytes) -> bool:
    words = np.frombuffer(data, np.uint64)
    with np.errstate(over="ignore"):
        found = int(np.bitwise_xor.reduce(words[1:] * _FACTOR)) ^ _SEED
    return bool(found == _CHECKSUM.unpack_from(data)[0])
