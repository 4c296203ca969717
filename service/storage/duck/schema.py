"""The tables of a tenant's DuckDB file, and DuckDB's errors told as the store's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

Cursor = duckdb.DuckDBPyConnection

FILE = "betrace.duckdb"
MAX_ROWS = 1001  # of a page, and one more to see whether there is a next
SCHEMA_VERSION = 2
# DuckDB's smallest: with 262 144, a small file's indexes take 1.8 MB of memory.
_BLOCK_BYTES = 16_384

# Ids are their bytes, times nanoseconds since 1970. There are no primary keys: see duckwrite.py.
# A key is 64 bits of an id (keys.py): a scan compares them faster than ids.
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
    """The store did not do it. Where ``transient`` the same call may work later."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class StoreCorrupt(StoreError):  # noqa: N818
    """The tenant's file is damaged: recreate it, and write its rows again."""

    def __init__(self, tenant: str, message: str) -> None:
        super().__init__(message, transient=False)
        self.tenant = tenant


def told(error: duckdb.Error, tenant: str, path: Path) -> StoreError:
    """What to raise for an error of DuckDB that met the file of ``tenant``."""
    text = str(error).partition("\n")[0]
    if any(sign in text for sign in _CORRUPT) or isinstance(error, duckdb.SerializationException):
        return StoreCorrupt(tenant, f"{path} is damaged ({text}): have it rebuilt")
    return StoreError(f"{path}: {text}", transient=isinstance(error, (*_TRANSIENT, *FATAL)))


def empty_file() -> bytes:
    """A file with the tables and no rows. To copy it costs a third of making the tables anew."""
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
    """Put a new file in its place, whole or not at all; :exc:`StoreError` where the disk fails."""
    temporary = path.with_name(FILE + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A write-ahead log without its file belongs to nothing.
        path.with_name(FILE + ".wal").unlink(missing_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be made ({error.strerror}): check the disk's free space and health",
            transient=True,
        ) from error


def migrate(cursor: Cursor, tenant: str, path: Path) -> None:
    """Make the tables in the file, which is the connection's default database, where it has none;
    bring those of an older version up to this one, each step a transaction."""
    rows = None
    with suppress(duckdb.CatalogException):
        rows = cursor.execute("SELECT version FROM meta").fetchall()
    # SHOW TABLES looks through all attached files: with 500, it takes 10 ms
    if rows is None and not cursor.execute("SHOW TABLES").fetchall():
        with transaction(cursor):
            cursor.execute(SCHEMA)
        return
    if not rows:
        raise StoreCorrupt(
            tenant, f"{path} is not a file of this program: move it away, and it is made anew"
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
    """A transaction: committed at the end of the block, rolled back where it raises."""
    cursor.execute("BEGIN")
    try:
        yield
        cursor.execute("COMMIT")
    except BaseException:
        with suppress(duckdb.Error):
            cursor.execute("ROLLBACK")
        raise
