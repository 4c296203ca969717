"""The directory of tenants, with their public keys and quotas, in an SQLite file.

On a cluster the configuration bucket has the tenants, and the file is this node's copy of them.

The name of a deleted tenant stays in the directory, because its entries in the append-only ledger
must not return to the query store. Methods block and may be called from any thread; they raise
:exc:`DirectoryError` if the disk fails.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from betrace.service.storage.sqlite_file import Schema, open_file, remedy, transaction
from betrace.service.tenancy.changes import Change
from betrace.service.tenancy.tenant import PublicKey, Tenant, TenantState
from betrace.service.tenants import TENANT_RULE, is_tenant_name

_VERSION_1 = """
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('active', 'deleting', 'deleted')),
    created_ns INTEGER NOT NULL,
    quota INTEGER,
    hidden_entry INTEGER NOT NULL DEFAULT 0,
    hidden_count INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE keys (
    tenant TEXT NOT NULL REFERENCES tenants (name),
    kid TEXT NOT NULL,
    public BLOB NOT NULL,
    created_ns INTEGER NOT NULL,
    expires_ns INTEGER,
    PRIMARY KEY (tenant, kid)
) STRICT;
"""
_VERSION_2 = """
ALTER TABLE tenants ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tenants ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
"""
_SCHEMA = Schema(0x42544E54, [_VERSION_1, _VERSION_2])  # "BTNT"


class DirectoryError(Exception):
    """The file cannot be read or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """The ledger entries of a tenant from before it was deleted: the number of the last one, and
    how many there are."""

    entry: int
    count: int


class TenantDirectory:
    """The directory in the file ``path``, which is created if missing."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        with self._errors():
            self._db = open_file(path, _SCHEMA, ("synchronous = FULL", "secure_delete = ON"))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DirectoryError(
                f"the tenant directory {self._path}: {error}: {remedy(error, 'the tenants in it')}"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            yield self._db

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db, transaction(db):
            yield db

    # Reading

    def get(self, name: str) -> Tenant | None:
        """The tenant if it is active or being deleted."""
        found = self.find(name)
        return None if found is None or found.state is TenantState.DELETED else found

    def find(self, name: str) -> Tenant | None:
        """The tenant, even if it was deleted."""
        with self._reading() as db:
            return _get(db, name)

    def all(self) -> list[Tenant]:
        """All tenants, including those that were deleted."""
        with self._reading() as db:
            names = db.execute("SELECT name FROM tenants ORDER BY name").fetchall()
            return [tenant for (name,) in names if (tenant := _get(db, name)) is not None]

    def page(self, after: str = "", limit: int = 1000) -> list[Tenant]:
        """The tenants that are active or being deleted, sorted by name, with names above
        ``after``."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT name FROM tenants WHERE state <> 'deleted' AND name > ? "
                "ORDER BY name LIMIT ?",
                (after, limit),
            ).fetchall()
            return [tenant for (name,) in rows if (tenant := _get(db, name)) is not None]

    def in_state(self, *states: TenantState) -> set[str]:
        """The names of the tenants in these states."""
        marks = ",".join("?" * len(states))
        with self._reading() as db:
            rows = db.execute(f"SELECT name FROM tenants WHERE state IN ({marks})", states)
            return {name for (name,) in rows}

    def quotas(self) -> dict[str, int]:
        """The quotas that were set, by tenant."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT name, quota FROM tenants WHERE quota IS NOT NULL AND state = 'active'"
            )
            return dict(rows.fetchall())

    def generations(self) -> dict[str, int]:
        """The generations of tenants that were deleted on a cluster, by tenant."""
        with self._reading() as db:
            rows = db.execute("SELECT name, generation FROM tenants WHERE generation > 0")
            return dict(rows.fetchall())

    def revisions(self) -> dict[str, int]:
        """The revisions of the entries of a cluster that are known, by tenant."""
        with self._reading() as db:
            rows = db.execute("SELECT name, revision FROM tenants WHERE revision > 0")
            return dict(rows.fetchall())

    def hidden(self) -> dict[str, Hidden]:
        """For each tenant that was ever deleted, its ledger entries from before."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT name, hidden_entry, hidden_count FROM tenants "
                "WHERE hidden_entry > 0 OR state <> 'active'"
            ).fetchall()
        return {name: Hidden(entry, count) for name, entry, count in rows}

    def public_key(self, name: str, kid: str) -> PublicKey | None:
        """A key of an active tenant, if it is valid now."""
        with self._reading() as db:
            row = db.execute(
                "SELECT kid, public, keys.created_ns, expires_ns FROM keys "
                "JOIN tenants ON name = tenant WHERE tenant = ? AND kid = ? AND state = 'active'",
                (name, kid),
            ).fetchone()
        key = None if row is None else PublicKey(*row)
        return key if key is not None and self._valid(key) else None

    def _valid(self, key: PublicKey) -> bool:
        return key.expires_ns is None or key.expires_ns > self._clock_ns()

    # Changing

    def change(self, name: str, change: Change) -> Tenant:
        """Change or create a tenant (:mod:`betrace.service.tenancy.changes`). Raises what
        ``change`` raises."""
        if not is_tenant_name(name):
            raise ValueError(TENANT_RULE)
        with self._changing() as db:
            made = change(name, _get(db, name), self._clock_ns())
            _write(db, made)
            return made

    def write(self, tenants: Iterable[Tenant]) -> None:
        """Replace tenants by what the cluster has."""
        with self._changing() as db:
            for tenant in tenants:
                _write(db, tenant)

    # Deleting

    def begin_deletion(self, name: str, generation: int = 0) -> None:
        """Mark a tenant, whether in the directory or not, as being deleted: it loses its keys and
        its quota. On a cluster, ``generation`` is the one after the deletion."""
        if not is_tenant_name(name):
            raise ValueError(TENANT_RULE)
        with self._changing() as db:
            found = _get(db, name)
            created_ns = self._clock_ns() if found is None else found.created_ns
            revision = 0 if found is None else found.revision
            generation = max(generation, 0 if found is None else found.generation)
            state = TenantState.DELETING
            _write(db, Tenant(name, state, created_ns, None, (), generation, revision))

    def hide(self, name: str, hidden: Hidden) -> None:
        """Store which ledger entries a tenant that is being deleted has."""
        with self._changing() as db:
            db.execute(
                "UPDATE tenants SET hidden_entry = ?, hidden_count = ? WHERE name = ?",
                (hidden.entry, hidden.count, name),
            )

    def finish_deletion(self, name: str) -> None:
        """Mark a tenant as deleted: only its entries in the ledger are left."""
        with self._changing() as db:
            db.execute("UPDATE tenants SET state = 'deleted' WHERE name = ?", (name,))

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            self._db.close()


def _get(db: sqlite3.Connection, name: str) -> Tenant | None:
    row = db.execute(
        "SELECT name, state, created_ns, quota, generation, revision FROM tenants WHERE name = ?",
        (name,),
    ).fetchone()
    if row is None:
        return None
    keys = db.execute(
        "SELECT kid, public, created_ns, expires_ns FROM keys WHERE tenant = ? "
        "ORDER BY created_ns DESC, kid",
        (name,),
    ).fetchall()
    name, state, created_ns, quota, generation, revision = row
    public = tuple(PublicKey(*key) for key in keys)
    return Tenant(name, TenantState(state), created_ns, quota, public, generation, revision)


def _write(db: sqlite3.Connection, tenant: Tenant) -> None:
    db.execute(
        "INSERT INTO tenants (name, state, created_ns, quota, generation, revision) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state, "
        "created_ns = excluded.created_ns, quota = excluded.quota, "
        "generation = excluded.generation, revision = excluded.revision",
        (
            tenant.name,
            tenant.state,
            tenant.created_ns,
            tenant.quota,
            tenant.generation,
            tenant.revision,
        ),
    )
    db.execute("DELETE FROM keys WHERE tenant = ?", (tenant.name,))
    db.executemany(
        "INSERT INTO keys (tenant, kid, public, created_ns, expires_ns) VALUES (?, ?, ?, ?, ?)",
        [(tenant.name, key.kid, key.public, key.created_ns, key.expires_ns) for key in tenant.keys],
    )
