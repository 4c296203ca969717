"""One in-memory DuckDB instance with a file attached for each tenant in use.

All tenants share the instance's buffer pool and threads, yet each one's data is a file,
``<data>/<tenant>/betrace.duckdb``, that can be copied or deleted on its own.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from service.storage.paths import tenant_directory, tenants_with
from service.storage.pool import Pool, PoolTimeout

Cursor = duckdb.DuckDBPyConnection

FILE = "betrace.duckdb"
SCHEMA_VERSION = 1
MAX_ROWS = 1001  # of a page, and one more to see whether there is a next
_CHECKPOINT_SIZE = "64MB"

# Ids are their bytes, times nanoseconds since 1970.
_SCHEMA = f"""
CREATE TABLE meta (version INTEGER NOT NULL, created_ns BIGINT NOT NULL);
CREATE TABLE signals (
    id BLOB PRIMARY KEY, seq BIGINT NOT NULL, rule_id VARCHAR NOT NULL,
    rule_version VARCHAR NOT NULL, severity VARCHAR NOT NULL, kind VARCHAR NOT NULL,
    status VARCHAR NOT NULL, clause VARCHAR NOT NULL, trace_id BLOB NOT NULL,
    detected_at BIGINT NOT NULL, early BOOLEAN NOT NULL, counts JSON NOT NULL,
    evidence JSON NOT NULL, labels JSON NOT NULL, message VARCHAR NOT NULL, reason VARCHAR
);
CREATE TABLE traces (
    trace_id BLOB PRIMARY KEY, start_ns BIGINT NOT NULL, end_ns BIGINT NOT NULL,
    first_seen_ns BIGINT NOT NULL, last_seen_ns BIGINT NOT NULL, spans BIGINT NOT NULL,
    errors BIGINT NOT NULL, root_name VARCHAR, root_service VARCHAR,
    services VARCHAR[] NOT NULL, positions BIGINT[] NOT NULL, partial BOOLEAN NOT NULL,
    rules_version VARCHAR NOT NULL
);
CREATE TABLE trace_frames (
    trace_id BLOB, first BIGINT, positions BIGINT[] NOT NULL, PRIMARY KEY (trace_id, first)
);
INSERT INTO meta VALUES ({SCHEMA_VERSION}, epoch_ns(now()));
"""

_CORRUPT = (
    "not a valid DuckDB database file",
    "Corrupt database file",
    "Could not read enough bytes",
    "Failure while replaying WAL",
)
_TRANSIENT = (
    duckdb.IOException,
    duckdb.TransactionException,
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
    duckdb.ConnectionException,
    duckdb.ResourceInUseException,
)
# After one of these DuckDB refuses all further work of the instance.
_FATAL = (duckdb.FatalException, duckdb.InternalException)


class StoreError(Exception):
    """The store did not do it. Where ``transient`` the same call may work later."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class StoreCorrupt(StoreError):  # noqa: N818
    """The tenant's file is damaged: recreate it, and write its rows again."""

    def __init__(self, tenant: str, message: str) -> None:
        super().__init__(message, transient=False)
        self.tenant = tenant


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
    last_used: float = 0.0

    @property
    def alias(self) -> str:
        """The database's quoted name; the prefix keeps it apart from DuckDB's own names."""
        return f'"t_{self.tenant}"'


class DuckFiles:
    """The files below ``directory``; sizes in bytes, times in seconds.

    At most ``attached_max`` files stay attached when unused; :meth:`sweep` detaches those
    unused for ``idle_close`` seconds. Each has at most ``pool_max`` connections, ``pool_idle``
    of them idle; a caller waits ``pool_timeout`` for one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int = 512 << 20,
        threads: int = 2,
        pool_max: int = 5,
        pool_idle: int = 1,
        pool_timeout: float = 5.0,
        idle_close: float = 300.0,
        attached_max: int = 1000,
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
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._generation = 1
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
        file = self._enter(tenant)
        try:
            assert file.pool is not None
            with self._told(file):
                if not write:
                    with file.pool.use() as cursor:
                        yield cursor
                else:
                    with self._writing(file), file.pool.use() as cursor, _transaction(cursor):
                        yield cursor
        finally:
            with file.changed:
                file.users -= 1
                file.last_used = self._clock()
                file.changed.notify_all()
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

    def _file(self, tenant: str) -> _File:
        path = self.path(tenant)
        with self._lock:
            if self._root is None:
                raise StoreError("the store is closed", transient=False)
            return self._files.setdefault(tenant, _File(tenant, path))

    def _enter(self, tenant: str) -> _File:
        """Count a user of the tenant's file, and attach it where it is not."""
        while True:
            file = self._file(tenant)
            with file.changed:
                if not file.changed.wait_for(lambda: not file.reserved, self._pool_timeout):  # noqa: B023
                    raise PoolTimeout(f"tenant {tenant}: its file is being replaced; try again")
                if self._files.get(tenant) is not file:  # detached or deleted meanwhile
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
        file.path.parent.mkdir(parents=True, exist_ok=True)
        if not file.path.exists():  # a write-ahead log without its file belongs to nothing
            file.path.with_name(FILE + ".wal").unlink(missing_ok=True)
        with self._told(file):
            root = self._cursor()
            with root:
                path = str(file.path).replace("'", "''")
                root.execute(f"ATTACH IF NOT EXISTS '{path}' AS {file.alias}")
                try:
                    root.execute(f"USE {file.alias}")
                    self._migrate(root, file)
                except BaseException:
                    root.execute("USE memory")
                    root.execute(f"DETACH {file.alias}")
                    raise
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

    def _cursor(self) -> Cursor:
        root = self._root
        if root is None:
            raise StoreError("the store is closed", transient=False)
        return root.cursor()

    def _connect(self, file: _File) -> Cursor:
        cursor = self._cursor()
        cursor.execute(f"USE {file.alias}")
        return cursor

    def _migrate(self, cursor: Cursor, file: _File) -> None:
        tables = {name for (name,) in cursor.execute("SHOW TABLES").fetchall()}
        if not tables:
            with _transaction(cursor):
                cursor.execute(_SCHEMA)
            return
        rows = cursor.execute("SELECT version FROM meta").fetchall() if "meta" in tables else []
        if not rows:
            raise StoreCorrupt(
                file.tenant,
                f"{file.path} is not a file of this program: move it away, and it is made anew",
            )
        if rows[0][0] > SCHEMA_VERSION:
            raise StoreError(
                f"{file.path} was written by a newer program (schema {rows[0][0]}, this one knows "
                f"{SCHEMA_VERSION}): upgrade, or move it away to have it rebuilt",
                transient=False,
            )

    @contextmanager
    def _told(self, file: _File) -> Iterator[None]:
        """Tell DuckDB's errors as :exc:`StoreError`."""
        try:
            yield
        except duckdb.Error as error:
            text = str(error).partition("\n")[0]
            if isinstance(error, _FATAL):
                self._restart(file.generation)
                raise StoreError(f"{file.path}: {text}", transient=True) from error
            if any(sign in text for sign in _CORRUPT) or isinstance(
                error, duckdb.SerializationException
            ):
                raise StoreCorrupt(
                    file.tenant, f"{file.path} is damaged ({text}): have it rebuilt"
                ) from error
            raise StoreError(
                f"{file.path}: {text}", transient=isinstance(error, _TRANSIENT)
            ) from error

    def _restart(self, generation: int) -> None:
        """Begin a new instance; each file is attached to it when it is next used."""
        with self._lock:
            if self._root is not None and generation == self._generation:
                self._generation += 1
                old, self._root = self._root, duckdb.connect(":memory:", config=self._settings)
                with suppress(duckdb.Error):
                    old.close()

    # Detaching

    def _detach(self, file: _File) -> None:
        """Let go of a file that nobody uses; the caller holds ``changed``."""
        pool, file.pool = file.pool, None
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
        """Delete the tenant's file, and its directory where nothing else is in it."""
        with self._reserved(tenant) as file:
            for path in (FILE, FILE + ".wal", FILE + ".damaged"):
                file.path.with_name(path).unlink(missing_ok=True)
            with suppress(OSError):
                os.rmdir(file.path.parent)

    def close(self) -> None:
        """Detach everything; connections in use end with their queries. Twice does no harm."""
        for file in list(self._files.values()):
            with suppress(StoreError):
                self._forget(file)
        with self._lock:
            root, self._root = self._root, None
            self._files.clear()
        if root is not None:
            root.close()
            shutil.rmtree(self._temporary, ignore_errors=True)


@contextmanager
def _transaction(cursor: Cursor) -> Iterator[None]:
    cursor.execute("BEGIN")
    try:
        yield
        cursor.execute("COMMIT")
    except BaseException:
        with suppress(duckdb.Error):
            cursor.execute("ROLLBACK")
        raise
