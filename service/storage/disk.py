"""Gathered writes that write everything or raise an error."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from betrace.service.storage.filesystem import sync_filesystem

Buffer = bytes | bytearray | memoryview

_IOV_MAX = os.sysconf("SC_IOV_MAX")


@dataclass(frozen=True, slots=True)
class Disk:
    """The system calls that change files; tests replace them with failing ones."""

    write: Callable[[int, Sequence[Buffer], int], int] = os.pwritev
    truncate: Callable[[int, int], None] = os.ftruncate
    sync: Callable[[int], None] = os.fdatasync
    sync_filesystem: Callable[[int], None] = sync_filesystem

    def write_all(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all bytes of ``buffers`` at ``offset``, in as few system calls as possible. After
        an :exc:`OSError` some of the bytes may have been written."""
        left = [buffer for buffer in buffers if len(buffer)]
        first = 0
        while first < len(left):
            written = self.write(descriptor, left[first : first + _IOV_MAX], offset)
            if written <= 0:
                raise OSError(errno.EIO, "the system wrote nothing")
            offset += written
            while first < len(left) and written >= len(left[first]):
                written -= len(left[first])
                first += 1
            if written:
                left[first] = memoryview(left[first])[written:]
