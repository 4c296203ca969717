"""Files that survive a machine crash: synced directories and atomic replacement.

A name is durable only once its directory is synced (`fsync(2)`), so a replaced file takes three
steps: sync the new file, rename it over the old one, sync the directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: Path, path: Path) -> None:
    """Move the file ``temporary`` to ``path`` in the same directory. After a crash ``path`` is the
    old file or the new one, whole."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` durably when the block ends. If the block raises, ``path``
    is unchanged.

    ``temporary`` is the new file's name until then: by default ``<name>.new`` in the same
    directory. The name is always the same, so that repeated crashes leave only one such file.
    """
    temporary = temporary or path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            yield file
        replace_durably(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Replace the contents of ``path`` with ``data``. After a crash it holds the old bytes or the
    new ones. See :func:`replacing`."""
    with replacing(path, temporary) as file:
        file.write(data)
