"""One in-memory DuckDB instance with a file attached for each tenant in use.

All tenants share the instance's buffer pool and threads, but each tenant's data is a file,
``<data>/<tenant>/betrace.duckdb``, which can be copied or deleted on its own.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from betrace.service.config.stores import DuckDb
from betrace.service.storage.duck.checkpointer import Checkpointer
from betrace.service.storage.duck.instance import Instance
from betrace.service.storage.duck.keys import KeyBudget
from betrace.service.storage.duck.memory import LogSize
from betrace.service.storage.duck.pool import Pool, PoolTimeout
from betrace.service.storage.duck.schema import (
    FATAL,
    FILE,
    Cursor,
    StoreCorrupt,
    StoreError,
    empty_file,
    make_file,
    migrate,
    store_error,
    transaction,
)
from betrace.service.storage.duck.tenant_file import TenantFile
from betrace.service.storage.duck.write import Known
from betrace.service.storage.paths import tenant_directory, tenants_with

_CLOSED_AT_ONCE = 4  # a checkpoint waits for the disk for half of its time
_INTERRUPTED_SECONDS = 1.0  # for a query to notice an interruption


def attachable() -> int:
    """How many files of tenants may stay attached when unused: at most 1000, and at most one in
    twelve files that the process may open, because each needs two descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1000 if soft == resource.RLIM_INFINITY else max(1, min(soft // 12, 1000))


class DuckFiles:
    """The files below ``directory``, within ``limits``.

    At most ``attached_max`` files stay attached when unused; :meth:`sweep` detaches those that have
    been unused for ``limits.idle_close_seconds``. ``key_bytes`` bounds the memory of the rows' keys
    (:class:`KeyBudget`). ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        directory: Path,
        limits: DuckDb,
        *,
        attached_max: int,
        key_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._limits = limits
        self._timeout = limits.pool_timeout_seconds
        self._attached_max = attached_max
        self._instance = Instance(limits, directory / ".duckdb")
        self._checkpointer = Checkpointer(self._instance, limits.memory_bytes, clock)
        self._keys = KeyBudget(key_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, TenantFile] = {}
        self._removed: set[str] = set()  # deleted tenants, for which nothing may be written
        self._empty = b""
        self._closing = False
        self.on_damaged: Callable[[StoreCorrupt], None] = lambda error: None
        """Called for each call that met damage in a file, in its thread."""

    def path(self, tenant: str) -> Path:
        """The path of the tenant's file. Raises :exc:`ValueError` for a bad name."""
        return tenant_directory(self._directory, tenant) / FILE

    def has(self, tenant: str) -> bool:
        """Whether the tenant has a file."""
        return self.path(tenant).exists()

    def tenants(self) -> list[str]:
        """The tenants that have a file, sorted."""
        return tenants_with(self._directory, FILE)

    @property
    def attached(self) -> int:
        """The number of attached files."""
        return sum(file.pool is not None for file in list(self._files.values()))

    def connections(self) -> dict[str, int]:
        """The number of open connections of each tenant whose file is attached."""
        pools = {file.tenant: file.pool for file in list(self._files.values())}
        return {tenant: pool.open for tenant, pool in pools.items() if pool is not None}

    # Using

    @contextmanager
    def use(self, tenant: str, write: bool = False) -> Iterator[Cursor]:
        """A connection whose default database is the tenant's, which is created if missing.

        With ``write`` the block is a transaction, the tenant's only one at a time. Raises DuckDB's
        errors as :exc:`StoreError` and :exc:`StoreCorrupt`, and :exc:`PoolTimeout` if no connection
        became free.
        """
        with self._using(tenant, write) as (cursor, _):
            yield cursor

    @contextmanager
    def append(self, tenant: str) -> Iterator[tuple[Cursor, Known]]:
        """As :meth:`use` for writing, with what is known of the existing rows."""
        with self._using(tenant, write=True) as (cursor, file):
            if file.known is None:
                known = Known(self._keys)
                known.load(cursor)
                file.known = known
            yield cursor, file.known

    @contextmanager
    def _using(self, tenant: str, write: bool) -> Iterator[tuple[Cursor, TenantFile]]:
        file = self._enter(tenant)
        try:
            assert file.pool is not None
            with self._errors(file):
                if not write:
                    with file.pool.use() as cursor:
                        yield cursor, file
                else:
                    with (
                        file.write_turn(self._timeout),
                        file.pool.use() as cursor,
                        transaction(cursor),
                    ):
                        yield cursor, file
        finally:
            with file.changed:
                file.users -= 1
                file.last_used = self._clock()
                file.changed.notify_all()
            if write:
                self._checkpointer.written(file, lambda: list(self._files.values()))
            if len(self._files) > self._attached_max:
                self._shrink()

    def forget_known(self, tenant: str) -> None:
        """Have the next :meth:`append` read the existing rows again, after a large deletion."""
        file = self._files.get(tenant)
        if file is not None:
            with file.write_turn(self._timeout):
                file.forget_known()

    def _file(self, tenant: str) -> TenantFile:
        path = self.path(tenant)
        with self._lock:
            if self._closing:
                raise StoreError("the store is closed", transient=False)
            if tenant in self._removed:
                raise _gone(tenant)
            return self._files.setdefault(tenant, TenantFile(tenant, path, LogSize(self._clock())))

    def _enter(self, tenant: str) -> TenantFile:
        """Count a user of the tenant's file, and attach the file if needed."""
        while True:
            file = self._file(tenant)
            with file.changed:
                if not file.changed.wait_for(lambda: not file.reserved, self._timeout):  # noqa: B023
                    raise PoolTimeout(f"tenant {tenant}: its file is being replaced; try again")
                if file.deleted:  # this user waited for the old tenant, not for a new one
                    raise _gone(tenant)
                if self._files.get(tenant) is not file:  # detached in the meantime
                    continue
                if file.pool is not None and not file.users and not self._current(file):
                    self._detach(file)
                if file.pool is None:
                    self._attach(file)
                file.users += 1
                return file

    def _current(self, file: TenantFile) -> bool:
        """Whether the attached file is still the one at the path."""
        try:
            inode = file.path.stat().st_ino
        except FileNotFoundError:
            return False
        return inode == file.inode and file.generation == self._instance.generation

    def _attach(self, file: TenantFile) -> None:
        new = not file.path.exists()
        with self._errors(file):
            if new:
                self._make(file)
            root = self._instance.cursor()
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
        file.generation = self._instance.generation
        file.pool = Pool(
            lambda: self._connect(file),
            lambda cursor: cursor.close(),
            limit=self._limits.pool_max,
            idle=self._limits.pool_idle,
            timeout=self._timeout,
            name=f"tenant {file.tenant}",
        )

    def _make(self, file: TenantFile) -> None:
        with self._lock:
            empty = self._empty = self._empty or empty_file()
        make_file(file.path, empty)

    def _connect(self, file: TenantFile) -> Cursor:
        cursor = self._instance.cursor()
        cursor.execute(f"USE {file.alias}")
        return cursor

    @contextmanager
    def _errors(self, file: TenantFile) -> Iterator[None]:
        """Raise DuckDB's errors as :exc:`StoreError`."""
        try:
            yield
        except duckdb.Error as error:
            if isinstance(error, FATAL):
                self._instance.restart(file.generation)
            found = store_error(error, file.tenant, file.path)
            if isinstance(found, StoreCorrupt):
                self.on_damaged(found)
            raise found from error

    # Detaching

    def _detach(self, file: TenantFile) -> None:
        """Detach a file that nobody uses; the caller holds ``changed``."""
        pool, file.pool = file.pool, None
        file.forget_known()
        self._checkpointer.detached(file)
        if pool is not None:
            pool.close()
            if file.generation == self._instance.generation:
                with self._errors(file), self._instance.cursor() as root:
                    root.execute(f"DETACH {file.alias}")

    def _forget(self, file: TenantFile) -> bool:
        """Detach a file and remove it from memory, unless it is in use; returns whether it did."""
        with file.changed:
            if file.users or file.reserved:
                return False
            self._detach(file)
            self._drop(file)
            return True

    def _drop(self, file: TenantFile) -> None:
        """Remove a detached file from memory; the caller holds ``changed``."""
        with self._lock:
            if self._files.get(file.tenant) is file:
                del self._files[file.tenant]

    def sweep(self) -> int:
        """Detach the files that have been unused for long; returns how many."""
        limit = self._clock() - self._limits.idle_close_seconds
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
    def _reserved(self, tenant: str) -> Iterator[TenantFile]:
        """The tenant's file, detached, for exclusive use."""
        file = self._file(tenant)
        with file.changed:
            file.reserved = True
            try:
                if not file.changed.wait_for(lambda: not file.users, self._timeout):
                    raise PoolTimeout(f"tenant {tenant}: its file is still in use; try again")
                with suppress(StoreError):  # a damaged file may fail to detach
                    self._detach(file)
                yield file
                self._drop(file)
            finally:
                file.reserved = False
                file.changed.notify_all()

    def recreate(self, tenant: str) -> None:
        """Rename the tenant's file to ``betrace.duckdb.damaged``, overwriting an older one; the
        next use creates an empty file."""
        with self._reserved(tenant) as file:
            file.path.with_name(FILE + ".wal").unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                file.path.replace(file.path.with_name(FILE + ".damaged"))

    def delete(self, tenant: str) -> None:
        """Delete the tenant's file, and its directory if that is then empty. Until :meth:`reopen`
        the tenant is refused, so that a thread that was left behind cannot create it again."""
        with self._lock:
            self._removed.discard(tenant)  # in case this is repeated
        with self._reserved(tenant) as file:
            for path in (FILE, FILE + ".wal", FILE + ".new", FILE + ".damaged"):
                file.path.with_name(path).unlink(missing_ok=True)
            with suppress(OSError):
                os.rmdir(file.path.parent)
            with self._lock:
                self._removed.add(tenant)
            file.deleted = True

    def reopen(self, tenant: str) -> None:
        """Accept a deleted tenant again."""
        with self._lock:
            self._removed.discard(tenant)

    def close(self) -> None:
        """Detach everything. Waits up to the pool's timeout for running calls, then interrupts
        them; a thread that still does not end keeps its file until it does. Idempotent."""
        with self._lock:
            self._closing = True
        if not self._unused(self._timeout):
            for file in list(self._files.values()):
                for cursor in file.pool.in_use if file.pool is not None else ():
                    cursor.interrupt()
            self._unused(_INTERRUPTED_SECONDS)
        with ThreadPoolExecutor(_CLOSED_AT_ONCE) as threads:
            list(threads.map(self._close_file, list(self._files.values())))
        with self._lock:
            self._files.clear()
        self._instance.close()

    def _close_file(self, file: TenantFile) -> None:
        with suppress(StoreError):
            self._forget(file)

    def _unused(self, seconds: float) -> bool:
        """Wait until no file is in use; returns False if that takes longer than ``seconds``."""
        end = time.monotonic() + seconds
        for file in list(self._files.values()):
            with file.changed:
                left = max(0.0, end - time.monotonic())
                if not file.changed.wait_for(lambda: not file.users, left):  # noqa: B023
                    return False
        return True


def _gone(tenant: str) -> StoreError:
    return StoreError(f"tenant {tenant} was deleted: create it again first", transient=False)
