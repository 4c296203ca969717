"""A bounded cache of open files."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_ENOUGH = 65_536
_KEPT = 1024
_SHARE = 8  # one in so many files that a process may open; connections and DuckDB need the rest


def raise_limit() -> None:
    """Raise this process' limit of open files as far as the system allows, up to 65 536: each
    connection needs one, each tenant three. The soft limit is low only for programs that use
    ``select``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # continue with the present limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def affordable() -> int:
    """How many files may stay open just to avoid reopening them: an eighth of this process' limit,
    at most 1024."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _KEPT if soft == resource.RLIM_INFINITY else max(1, min(soft // _SHARE, _KEPT))


@dataclass(slots=True, eq=False)
class _OpenFile:
    descriptor: int
    users: int = 0
    doomed: bool = False  # close when the last user is done


class OpenFiles:
    """Keeps up to ``limit`` files open (with ``flags``), closing the least recently used one.

    A file in use is never closed, so there may be more open files than ``limit`` while there are
    more users. Thread-safe.
    """

    def __init__(self, limit: int, flags: int = os.O_RDWR) -> None:
        if limit < 1:
            raise ValueError("the limit of open files must be at least 1")
        self._limit = limit
        self._flags = flags | os.O_CLOEXEC
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    @contextmanager
    def use(self, path: Path, flags: int = 0) -> Iterator[int]:
        """The descriptor of ``path``, opened (with these additional flags) if it is not open yet;
        it stays open until the block ends. Raises :exc:`OSError` as :func:`os.open` does."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = _OpenFile(os.open(path, self._flags | flags, 0o644))
                self._files[path] = file
            file.users += 1
            self._files.move_to_end(path)
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                if file.doomed and not file.users:
                    os.close(file.descriptor)
                self._shrink()

    def forget(self, path: Path) -> None:
        """Close ``path`` as soon as nobody uses it; the next use opens it again."""
        with self._lock:
            file = self._files.pop(path, None)
            if file is not None:
                self._doom(file)

    def close(self) -> None:
        """Close every file as soon as nobody uses it."""
        with self._lock:
            for file in self._files.values():
                self._doom(file)
            self._files.clear()

    def _doom(self, file: _OpenFile) -> None:
        if file.users:
            file.doomed = True
        else:
            os.close(file.descriptor)

    def _shrink(self) -> None:
        if len(self._files) <= self._limit:
            return
        for path, file in list(self._files.items()):
            if not file.users:
                del self._files[path]
                os.close(file.descriptor)
                if len(self._files) <= self._limit:
                    return
