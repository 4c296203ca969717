"""The tables of a tenant's DuckDB file, and DuckDB's errors as errors of the store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

Cursor = duckdb.DuckDBPyConnection

FILE = "betrace.duckdb"
MAX_ROWS = 1001  # rows of a page, plus one that shows whether there is a next page
SCHEMA_VERSION = 2
TABLES = ("signals", "traces", "trace_frames")
# The smallest that DuckDB allows: with 262 144, a small file's indexes take 1.8 MB of memory.
_BLOCK_BYTES = 16_384

# Ids are bytes, times are nanoseconds since 1970. There are no primary keys; write.py says why. A
# key is 64 bits of an id (keys.py), which a scan compares faster than ids.
_TABLES = """
CREATE TABLE signals (
    id BLOB NOT NULL, key UBIGINT NOT NULL, seq BIGINT NOT NULL, rule_id VARCHAR NOT NULL,
    rule_version VARCHAR NOT NULL, severity VARCHAR NOT NULL, kind VARCHAR NOT NULL,
    status VARCHAR NOT NULL, clause VARCHAR NOT NULL, trace_id BLOB NOT NULL,
    trace_key UBIGINT NOT NULL, detected_at BIGINT NOT NULL, early BOOLEAN NOT NULL,
    counts JSON NOT NULL, evidence JSON NOT NULL, labels JSON NOT NULL, message VARCHAR NOT NULL,
    reason VARCHAR, context JSON
);
CREATE TABLE traces (
    trace_id BLOB NOT NULL, key UBIGINT NOT NULL, start_ns BIGINT NOT NULL, end_ns BIGINT NOT NULL,
    first_seen_ns BIGINT NOT NULL, last_seen_ns BIGINT NOT NULL, spans BIGINT NOT NULL,
    errors BIGINT NOT NULL, root_name VARCHAR, root_service VARCHAR,
    services VARCHAR[] NOT NULL, positions BIGINT[] NOT NULL, partial BOOLEAN NOT NULL,
    rules_version VARCHAR NOT NULL
);
CREATE TABLE trace_frames (
    trace_id BLOB NOT NULL, key UBIGINT NOT NULL, "first" BIGINT NOT NULL,
    positions BIGINT[] NOT NULL
);
"""
SCHEMA = f"""
CREATE TABLE meta (version INTEGER NOT NULL, created_ns BIGINT NOT NULL);
{_TABLES}
INSERT INTO meta VALUES ({SCHEMA_VERSION}, epoch_ns(now()));
"""


def _key(column: str) -> str:
    high, low = (f"CAST('0x' || hex({column})[{part}] AS UBIGINT)" for part in (":16", "17:"))
    return f"xor({high}, {low})"


_FROM_1 = f"""
ALTER TABLE signals RENAME TO old_signals;
ALTER TABLE traces RENAME TO old_traces;
ALTER TABLE trace_frames RENAME TO old_frames;
{_TABLES}
INSERT INTO signals BY NAME
    SELECT *, {_key("id")} AS key, {_key("trace_id")} AS trace_key FROM old_signals;
INSERT INTO traces BY NAME SELECT *, {_key("trace_id")} AS key FROM old_traces;
INSERT INTO trace_frames BY NAME SELECT *, {_key("trace_id")} AS key FROM old_frames;
DROP TABLE old_signals;
DROP TABLE old_traces;
DROP TABLE old_frames;
UPDATE meta SET version = 2;
"""
_MIGRATIONS = {1: _FROM_1}  # from a version to the next

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
FATAL = (duckdb.FatalException, duckdb.InternalException)


class StoreError(Exception):
    """The store failed. If ``transient``, the same call may succeed later."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class StoreCorrupt(StoreError):  # noqa: N818
    """The tenant's file is damaged: recreate it and write its rows again."""

    def __init__(self, tenant: str, message: str) -> None:
        super().__init__(message, transient=False)
        self.tenant = tenant


def store_error(error: duckdb.Error, tenant: str, path: Path) -> StoreError:
    """The error to raise for an error of DuckDB with the file of ``tenant``."""
    text = str(error).partition("\n")[0]
    if any(sign in text for sign in _CORRUPT) or isinstance(error, duckdb.SerializationException):
        return StoreCorrupt(tenant, f"{path} is damaged ({text}); the service rebuilds it")
    return StoreError(f"{path}: {text}", transient=isinstance(error, (*_TRANSIENT, *FATAL)))


def empty_file() -> bytes:
    """The contents of a file with empty tables. Copying it costs a third of creating the tables."""
    with tempfile.TemporaryDirectory() as directory, duckdb.connect(":memory:") as db:
        path = Path(directory) / FILE
        quoted = str(path).replace("'", "''")
        db.execute(f"ATTACH '{quoted}' AS made (BLOCK_SIZE {_BLOCK_BYTES})")
        db.execute("USE made")
        with transaction(db):
            db.execute(SCHEMA)
        db.execute("USE memory")
        db.execute("DETACH made")
        return path.read_bytes()


def make_file(path: Path, content: bytes) -> None:
    """Create a new file, whole or not at all. Raises :exc:`StoreError` if the disk fails.

    The directory is not synced, which would slow down the first write of each tenant: a file lost
    in a crash is rebuilt.
    """
    temporary = path.with_name(FILE + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A write-ahead log without its file is useless.
        path.with_name(FILE + ".wal").unlink(missing_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be created ({error.strerror}): check the disk's free space and health",
            transient=True,
        ) from error


def migrate(cursor: Cursor, tenant: str, path: Path) -> None:
    """Create the tables in the connection's default database if it has none, or migrate them from
    an older version, each step in a transaction."""
    rows = None
    with suppress(duckdb.CatalogException):
        rows = cursor.execute("SELECT version FROM meta").fetchall()
    # SHOW TABLES reads all attached files: with 500 it takes 10 ms
    if rows is None and not cursor.execute("SHOW TABLES").fetchall():
        with transaction(cursor):
            cursor.execute(SCHEMA)
        return
    if not rows:
        raise StoreCorrupt(
            tenant, f"{path} is not a file of this program: move it away, and a new one is created"
        )
    version = rows[0][0]
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer program (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): upgrade, or move it away to have it rebuilt",
            transient=False,
        )
    for step in range(version, SCHEMA_VERSION):
        with transaction(cursor):
            cursor.execute(_MIGRATIONS[step])


@contextmanager
def transaction(cursor: Cursor) -> Iterator[None]:
    """A transaction, committed at the end of the block and rolled back if the block raises."""
    cursor.execute("BEGIN")
    try:
        yield
        cursor.execute("COMMIT")
    except BaseException:
        with suppress(duckdb.Error):
            cursor.execute("ROLLBACK")
        raise
