"""One in-memory DuckDB instance with a file attached for each tenant in use.

All tenants share the instance's buffer pool and threads, yet each one's data is a file,
``<data>/<tenant>/betrace.duckdb``, that can be copied or deleted on its own.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from betrace.service.storage.duck import memory as duckmemory
from betrace.service.storage.duck.keys import KeyBudget
from betrace.service.storage.duck.pool import Pool, PoolTimeout
from betrace.service.storage.duck.schema import (
    FATAL,
    FILE,
    MAX_ROWS,
    Cursor,
    StoreError,
    empty_file,
    make_file,
    migrate,
    told,
    transaction,
)
from betrace.service.storage.duck.write import Known
from betrace.service.storage.paths import tenant_directory, tenants_with

__all__ = ["DuckFiles", "StoreError"]

_CHECKPOINT_SIZE = "64MB"
_UNSAVED_FILE_BYTES = 850_000  # memory of a file with a few rows that are not checkpointed yet
_SAVED_AT_ONCE = 4
# A log with more than _SAVED_BYTES is not left longer: memory stays flat, and little is to be read
# after a crash. A little apart, so that the files of many tenants are not saved all at once.
_SAVED_SECONDS = (45.0, 75.0)
_SAVED_BYTES = 4 << 20
_PAGES_PART = 32  # of the memory, for pages of files that are kept after a checkpoint
_CLOSED_AT_ONCE = 4  # a checkpoint waits for the disk half of its time
_INTERRUPTED_SECONDS = 1.0  # for a query to notice
_UNSAVED_FACTOR = 2  # memory of such rows, in sizes of their log


@dataclass(slots=True, eq=False)
class _File:
    """A tenant's file. ``changed`` guards the rest."""

    tenant: str
    path: Path
    changed: threading.Condition = field(default_factory=threading.Condition)
    writing: threading.Lock = field(default_factory=threading.Lock)
    pool: Pool[Cursor] | None = None  # None: not attached
    generation: int = 0  # of the instance it is attached to
    inode: int = 0
    users: int = 0
    reserved: bool = False  # being deleted or recreated: newcomers wait
    deleted: bool = False
    last_used: float = 0.0
    known: Known | None = None  # of its rows; guarded by ``writing``
    unsaved: int = 0  # bytes in its write-ahead log, whose rows DuckDB must keep in memory
    saved: float = 0.0  # when that was short the last time
    patience: float = field(default_factory=lambda: random.uniform(*_SAVED_SECONDS))

    @property
    def alias(self) -> str:
        """The database's quoted name; the prefix keeps it apart from DuckDB's own names."""
        return f'"t_{self.tenant}"'


class DuckFiles:
    """The files below ``directory``; sizes in bytes, times in seconds.

    At most ``attached_max`` files stay attached when unused; :meth:`sweep` detaches those
    unused for ``idle_close`` seconds. Each has at most ``pool_max`` connections, ``pool_idle``
    of them idle; a caller waits ``pool_timeout`` for one. ``key_bytes`` bounds the memory of the
    keys of rows (:class:`KeyBudget`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int = 1 << 30,
        threads: int = 2,
        pool_max: int = 5,
        pool_idle: int = 1,
        pool_timeout: float = 5.0,
        idle_close: float = 300.0,
        attached_max: int = 1000,
        key_bytes: int = 128 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._temporary = directory / ".duckdb"
        self._settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_bytes}B",
            "threads": threads,
            "temp_directory": str(self._temporary),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            # A checkpoint writes most of a table's index again: do it seldom.
            "checkpoint_threshold": _CHECKPOINT_SIZE,
            # Pages are read by their sort key first, the other columns of those rows after.
            "late_materialization_max_rows": MAX_ROWS,
        }
        self._pool_max = pool_max
        self._pool_idle = pool_idle
        self._pool_timeout = pool_timeout
        self._idle_close = idle_close
        self._attached_max = attached_max
        self._unsaved = 0  # the memory of all such rows
        self._unsaved_max = memory_bytes * 3 // 4
        self._memory = memory_bytes
        self._keys = KeyBudget(key_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._removed: set[str] = set()  # tenants of which nothing is to be written
        self._empty = b""
        self._generation = 1
        self._closing = False
        directory.mkdir(parents=True, exist_ok=True)
        self._root: Cursor | None = duckdb.connect(":memory:", config=self._settings)

    def path(self, tenant: str) -> Path:
        """The tenant's file; :exc:`ValueError` for a bad name."""
        return tenant_directory(self._directory, tenant) / FILE

    def has(self, tenant: str) -> bool:
        """Whether the tenant has a file."""
        return self.path(tenant).exists()

    def tenants(self) -> list[str]:
        """The tenants that have a file, sorted."""
        return tenants_with(self._directory, FILE)

    @property
    def attached(self) -> int:
        """How many files are attached."""
        return sum(file.pool is not None for file in list(self._files.values()))

    def connections(self) -> dict[str, int]:
        """The open connections of each tenant whose file is attached."""
        pools = {file.tenant: file.pool for file in list(self._files.values())}
        return {tenant: pool.open for tenant, pool in pools.items() if pool is not None}

    # Using

    @contextmanager
    def use(self, tenant: str, write: bool = False) -> Iterator[Cursor]:
        """A connection whose default database is the tenant's, which is made where it is missing.

        With ``write`` the block is a transaction, and the tenant's only one. Errors of
        DuckDB are told as :exc:`StoreError`, :exc:`StoreCorrupt`; :exc:`PoolTimeout` where no
        connection became free.
        """
        with self._using(tenant, write) as (cursor, _):
            yield cursor

    @contextmanager
    def append(self, tenant: str) -> Iterator[tuple[Cursor, Known]]:
        """As :meth:`use` to write, with what is known of the rows that are there."""
        with self._using(tenant, write=True) as (cursor, file):
            if file.known is None:
                known = Known(self._keys)
                known.load(cursor)
                file.known = known
            yield cursor, file.known

    @contextmanager
    def _using(self, tenant: str, write: bool) -> Iterator[tuple[Cursor, _File]]:
        file = self._enter(tenant)
        try:
            assert file.pool is not None
            with self._told(file):
                if not write:
                    with file.pool.use() as cursor:
                        yield cursor, file
                else:
                    with self._writing(file), file.pool.use() as cursor, transaction(cursor):
                        yield cursor, file
        finally:
            with file.changed:
                file.users -= 1
                file.last_used = self._clock()
                file.changed.notify_all()
            if write:
                self._relieve(file)
            if len(self._files) > self._attached_max:
                self._shrink()

    @contextmanager
    def _writing(self, file: _File) -> Iterator[None]:
        if not file.writing.acquire(timeout=self._pool_timeout):
            raise PoolTimeout(
                f"tenant {file.tenant}: another write took more than {self._pool_timeout:g} s; "
                "try again"
            )
        try:
            yield
        finally:
            file.writing.release()

    def forget_known(self, tenant: str) -> None:
        """Have the next :meth:`append` read again what is there, after much was deleted."""
        file = self._files.get(tenant)
        if file is not None:
            with self._writing(file):
                _forget_known(file)

    def _file(self, tenant: str) -> _File:
        path = self.path(tenant)
        with self._lock:
            if self._closing:
                raise StoreError("the store is closed", transient=False)
            if tenant in self._removed:
                raise _gone(tenant)
            return self._files.setdefault(tenant, _File(tenant, path, saved=self._clock()))

    def _enter(self, tenant: str) -> _File:
        """Count a user of the tenant's file, and attach it where it is not."""
        while True:
            file = self._file(tenant)
            with file.changed:
                if not file.changed.wait_for(lambda: not file.reserved, self._pool_timeout):  # noqa: B023
                    raise PoolTimeout(f"tenant {tenant}: its file is being replaced; try again")
                if file.deleted:  # what waited is of the old tenant, should there be a new one
                    raise _gone(tenant)
                if self._files.get(tenant) is not file:  # detached meanwhile
                    continue
                if file.pool is not None and not file.users and not self._current(file):
                    self._detach(file)
                if file.pool is None:
                    self._attach(file)
                file.users += 1
                return file

    def _current(self, file: _File) -> bool:
        """Whether what is attached is still the file at the path."""
        try:
            inode = file.path.stat().st_ino
        except FileNotFoundError:
            return False
        return inode == file.inode and file.generation == self._generation

    def _attach(self, file: _File) -> None:
        new = not file.path.exists()
        with self._told(file):
            if new:
                self._make(file)
            root = self._cursor()
            with root:
                path = str(file.path).replace("'", "''")
                root.execute(f"ATTACH IF NOT EXISTS '{path}' AS {file.alias}")
                try:
                    root.execute(f"USE {file.alias}")
                    if not new:
                        migrate(root, file.tenant, file.path)
                except BaseException:
                    root.execute("USE memory")
                    root.execute(f"DETACH {file.alias}")
                    raise
        if new:
            file.known = Known(self._keys)
        file.inode = file.path.stat().st_ino
        file.generation = self._generation
        file.pool = Pool(
            lambda: self._connect(file),
            lambda cursor: cursor.close(),
            limit=self._pool_max,
            idle=self._pool_idle,
            timeout=self._pool_timeout,
            name=f"tenant {file.tenant}",
        )

    def _make(self, file: _File) -> None:
        with self._lock:
            empty = self._empty = self._empty or empty_file()
        make_file(file.path, empty)

    def _cursor(self) -> Cursor:
        root = self._root
        if root is None:
            raise StoreError("the store is closed", transient=False)
        return root.cursor()

    def _connect(self, file: _File) -> Cursor:
        cursor = self._cursor()
        cursor.execute(f"USE {file.alias}")
        return cursor

    @contextmanager
    def _told(self, file: _File) -> Iterator[None]:
        """Tell DuckDB's errors as :exc:`StoreError`."""
        try:
            yield
        except duckdb.Error as error:
            if isinstance(error, FATAL):
                self._restart(file.generation)
            raise told(error, file.tenant, file.path) from error

    def _restart(self, generation: int) -> None:
        """Begin a new instance; each file is attached to it when it is next used."""
        with self._lock:
            if self._root is not None and generation == self._generation:
                self._generation += 1
                old, self._root = self._root, duckdb.connect(":memory:", config=self._settings)
                with suppress(duckdb.Error):
                    old.close()

    # Memory

    def _relieve(self, written: _File) -> None:
        """Keep the rows that only memory and the write-ahead logs have to ¾ of the memory.

        DuckDB checkpoints a file when its log is long, whatever its memory is used for, so that
        many tenants with a little each would exhaust it (1 GiB at some 1200 tenants).
        Those written longest ago are checkpointed; a few at most, so that no write waits long.
        So is one whose log was not short for about a minute: between a few large logs memory would
        grow for many minutes.
        """
        before = written.unsaved
        self._note_unsaved(written, _size(written.path.with_name(FILE + ".wal")))
        if written.unsaved < before:  # DuckDB made a checkpoint by itself
            with suppress(duckdb.Error, StoreError), self._cursor() as root:
                self._trim(root)
        if self._clock() - written.saved > written.patience:
            written.saved = self._clock()  # also where it fails
            self._save(written)
        excess = self._unsaved - self._unsaved_max
        if excess <= 0:
            return
        unsaved = [file for file in list(self._files.values()) if file.unsaved]
        for file in sorted(unsaved, key=lambda file: file.last_used)[:_SAVED_AT_ONCE]:
            if excess > 0:
                excess -= _memory(file)
                self._save(file)

    def _note_unsaved(self, file: _File, size: int) -> None:
        with self._lock:
            self._unsaved -= _memory(file)
            if size < max(file.unsaved, _SAVED_BYTES):
                file.saved = self._clock()
            file.unsaved = size
            self._unsaved += _memory(file)

    def _save(self, file: _File) -> None:
        with file.changed:
            if file.pool is None or file.reserved or not file.writing.acquire(blocking=False):
                return
            file.users += 1
        try:
            with suppress(duckdb.Error, StoreError), self._cursor() as root:
                root.execute(f"CHECKPOINT {file.alias}").fetchall()
                self._trim(root)
            self._note_unsaved(file, _size(file.path.with_name(FILE + ".wal")))
        finally:
            file.writing.release()
            with file.changed:
                file.users -= 1
                file.changed.notify_all()

    def _trim(self, root: Cursor) -> None:
        duckmemory.let_go_of_pages(root, self._memory // _PAGES_PART, self._memory)

    # Detaching

    def _detach(self, file: _File) -> None:
        """Let go of a file that nobody uses; the caller holds ``changed``."""
        pool, file.pool = file.pool, None
        _forget_known(file)
        self._note_unsaved(file, 0)
        if pool is not None:
            pool.close()
            if file.generation == self._generation:
                with self._told(file), self._cursor() as root:
                    root.execute(f"DETACH {file.alias}")

    def _forget(self, file: _File) -> bool:
        """Detach a file if nobody uses it, and keep nothing of it in memory."""
        with file.changed:
            if file.users or file.reserved:
                return False
            self._detach(file)
            self._drop(file)
            return True

    def _drop(self, file: _File) -> None:
        """Keep nothing in memory of a detached file; the caller holds ``changed``."""
        with self._lock:
            if self._files.get(file.tenant) is file:
                del self._files[file.tenant]

    def sweep(self) -> int:
        """Detach the files that were unused for long; how many."""
        limit = self._clock() - self._idle_close
        return sum(
            self._forget(file)
            for file in list(self._files.values())
            if not file.users and file.last_used <= limit
        )

    def _shrink(self) -> None:
        oldest = sorted(self._files.values(), key=lambda file: file.last_used)
        for file in oldest[: max(0, len(oldest) - self._attached_max)]:
            self._forget(file)

    @contextmanager
    def _reserved(self, tenant: str) -> Iterator[_File]:
        """The tenant's file, detached, with everyone else kept out."""
        file = self._file(tenant)
        with file.changed:
            file.reserved = True
            try:
                if not file.changed.wait_for(lambda: not file.users, self._pool_timeout):
                    raise PoolTimeout(f"tenant {tenant}: its file is still in use; try again")
                with suppress(StoreError):  # a damaged file may not detach in order
                    self._detach(file)
                yield file
                self._drop(file)
            finally:
                file.reserved = False
                file.changed.notify_all()

    def recreate(self, tenant: str) -> None:
        """Put the tenant's file aside, as ``betrace.duckdb.damaged``, where the next use makes it
        anew and empty. An older one put aside is overwritten."""
        with self._reserved(tenant) as file:
            file.path.with_name(FILE + ".wal").unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                file.path.replace(file.path.with_name(FILE + ".damaged"))

    def delete(self, tenant: str) -> None:
        """Delete the tenant's file, and its directory where nothing else is in it. Until
        :meth:`reopen`, uses are refused: a thread that was left behind must not make it anew."""
        with self._lock:
            self._removed.discard(tenant)  # where this is done a second time
        with self._reserved(tenant) as file:
            for path in (FILE, FILE + ".wal", FILE + ".new", FILE + ".damaged"):
                file.path.with_name(path).unlink(missing_ok=True)
            with suppress(OSError):
                os.rmdir(file.path.parent)
            with self._lock:
                self._removed.add(tenant)
            file.deleted = True

    def reopen(self, tenant: str) -> None:
        """Let a deleted tenant have a file again."""
        with self._lock:
            self._removed.discard(tenant)

    def close(self) -> None:
        """Detach everything. What still runs is waited for up to the pool's timeout, then
        interrupted; a thread that does not end even then keeps its file until it does. Twice does
        no harm."""
        with self._lock:
            root, self._closing = self._root, True
        if root is None:
            return
        if not self._unused(self._pool_timeout):
            for file in list(self._files.values()):
                for cursor in file.pool.in_use if file.pool is not None else ():
                    cursor.interrupt()
            self._unused(_INTERRUPTED_SECONDS)
        with ThreadPoolExecutor(_CLOSED_AT_ONCE) as threads:
            list(threads.map(self._let_go, list(self._files.values())))
        with self._lock:
            self._root = None
            self._files.clear()
        with suppress(duckdb.ResourceInUseException):
            root.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _let_go(self, file: _File) -> None:
        with suppress(StoreError):
            self._forget(file)

    def _unused(self, seconds: float) -> bool:
        """Wait until no file is in use; False where that takes longer."""
        end = time.monotonic() + seconds
        for file in list(self._files.values()):
            with file.changed:
                left = max(0.0, end - time.monotonic())
                if not file.changed.wait_for(lambda: not file.users, left):  # noqa: B023
                    return False
        return True


def _gone(tenant: str) -> StoreError:
    return StoreError(f"tenant {tenant} was deleted: create it again first", transient=False)


def _forget_known(file: _File) -> None:
    known, file.known = file.known, None
    if known is not None:
        known.clear()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _memory(file: _File) -> int:
    return _UNSAVED_FILE_BYTES + _UNSAVED_FACTOR * file.unsaved if file.unsaved else 0
