"""One call that makes everything written to a filesystem durable, if it is reliable there.

With many dirty files ``syncfs(2)`` is several times cheaper than a sync of each file, because the
journal is committed and the disk's cache flushed only once. Since Linux 5.8 it reports failed
writes, once, to descriptors of the filesystem that were open before. It is used only where that is
known to hold. It writes other programs' data too, so the caller watches how long it takes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

# statfs(2): ext2 to ext4, XFS and Btrfs. Others report no errors (overlayfs) or sync less (FUSE).
_RELIABLE = frozenset({0xEF53, 0x58465342, 0x9123683E})
_STATFS_BYTES = 256  # at least; its first word is the type

SyncFilesystem = Callable[[int], None]


def sync_filesystem(descriptor: int) -> None:
    """Write everything on the filesystem of ``descriptor`` to disk. Raises :exc:`OSError` if that
    fails, or if any write to the filesystem failed since the last call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(ctypes.c_int(descriptor)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def reliable(directory: Path) -> bool:
    """Whether :func:`sync_filesystem` can replace a sync of each file there."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if (
        platform.system() != "Linux"
        or version is None
        or tuple(map(int, version.groups())) < (5, 8)
    ):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):
        return False
    answer = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    if libc.statfs(os.fsencode(directory), ctypes.byref(answer)):
        return False
    return answer[0] in _RELIABLE
