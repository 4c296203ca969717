"""The directory of tenants, with their public keys and quotas, in an SQLite file.

The name of a deleted tenant stays in the directory, because its entries in the append-only ledger
must not return to the query store. Methods block and may be called from any thread; they raise
:exc:`TenantError`, and :exc:`DirectoryError` if the disk fails.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from betrace.service.storage.sqlite_file import Schema, open_file, remedy, transaction
from betrace.service.tenancy.tokens import key_id
from betrace.service.tenants import TENANT_RULE, is_tenant_name

MOST_KEYS = 16
"""Keys per tenant, including those in their grace period."""

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
_SCHEMA = Schema(0x42544E54, [_VERSION_1])  # "BTNT"


class TenantState(StrEnum):
    """The state of a tenant in the directory."""

    ACTIVE = "active"
    DELETING = "deleting"
    DELETED = "deleted"


class TenantError(Exception):
    """The request cannot be carried out for this tenant; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UnknownTenantError(TenantError):
    """The tenant does not exist, or it has no such key."""


class TenantConflictError(TenantError):
    """The tenant already exists, is being deleted, or has too many keys."""


class DirectoryError(Exception):
    """The file cannot be read or written; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key of a tenant: 32 bytes. Its tokens are valid until ``expires_ns`` (nanoseconds since
    1970), without end if that is None."""

    kid: str
    public: bytes
    created_ns: int
    expires_ns: int | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant in the directory. ``quota`` is in spans per second: 0 means no limit, None the quota
    from the configuration."""

    name: str
    state: TenantState
    created_ns: int
    quota: int | None
    keys: tuple[PublicKey, ...] = ()


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
        with self._reading() as db:
            return _get(db, name)

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

    def create(self, name: str, quota: int | None, public: bytes | None) -> Tenant:
        """Create a tenant, with its first key if given; a deleted tenant starts afresh. Raises
        :exc:`TenantConflictError` if it exists."""
        if not is_tenant_name(name):
            raise ValueError(TENANT_RULE)
        now = self._clock_ns()
        with self._changing() as db:
            found = _get(db, name)
            if found is not None:
                state = "is being deleted" if found.state is TenantState.DELETING else "exists"
                raise TenantConflictError(f"the tenant {name} {state}", "choose another name")
            db.execute(
                "INSERT INTO tenants (name, state, created_ns, quota) VALUES (?, 'active', ?, ?) "
                "ON CONFLICT DO UPDATE SET state = 'active', created_ns = excluded.created_ns, "
                "quota = excluded.quota",
                (name, now, quota),
            )
            if public is not None:
                _insert_key(db, name, public, now)
            return _existing(db, name)

    def set_quota(self, name: str, quota: int | None) -> Tenant:
        """Change the quota. Raises :exc:`UnknownTenantError`."""
        with self._changing() as db:
            _active(db, name)
            db.execute("UPDATE tenants SET quota = ? WHERE name = ?", (quota, name))
            return _existing(db, name)

    def add_key(self, name: str, public: bytes, grace_seconds: float) -> Tenant:
        """Add a key; the other keys stay valid for ``grace_seconds``. Raises
        :exc:`UnknownTenantError` and :exc:`TenantConflictError`."""
        now = self._clock_ns()
        until = now + int(grace_seconds * 1e9)
        with self._changing() as db:
            tenant = _active(db, name)
            kid = key_id(public)
            if any(key.kid == kid for key in tenant.keys):
                raise TenantConflictError(
                    f"the tenant {name} already has this key", "make a new key"
                )
            db.execute("DELETE FROM keys WHERE tenant = ? AND expires_ns <= ?", (name, now))
            left = db.execute("SELECT count(*) FROM keys WHERE tenant = ?", (name,)).fetchone()
            if left[0] >= MOST_KEYS:
                raise TenantConflictError(
                    f"the tenant {name} has {MOST_KEYS} keys, the most allowed",
                    "revoke one of them first",
                )
            db.execute(
                "UPDATE keys SET expires_ns = min(coalesce(expires_ns, ?), ?) WHERE tenant = ?",
                (until, until, name),
            )
            _insert_key(db, name, public, now)
            return _existing(db, name)

    def revoke_key(self, name: str, kid: str) -> Tenant:
        """Remove a key, which makes its tokens invalid. Raises :exc:`UnknownTenantError`."""
        with self._changing() as db:
            _active(db, name)
            gone = db.execute("DELETE FROM keys WHERE tenant = ? AND kid = ?", (name, kid))
            if not gone.rowcount:
                raise UnknownTenantError(
                    f"the tenant {name} has no such key", "see `betrace tenants list`"
                )
            return _existing(db, name)

    # Deleting

    def begin_deletion(self, name: str) -> None:
        """Mark a tenant, whether in the directory or not, as being deleted: it loses its keys and
        its quota."""
        if not is_tenant_name(name):
            raise ValueError(TENANT_RULE)
        with self._changing() as db:
            db.execute("DELETE FROM keys WHERE tenant = ?", (name,))
            db.execute(
                "INSERT INTO tenants (name, state, created_ns) VALUES (?, 'deleting', ?) "
                "ON CONFLICT DO UPDATE SET state = 'deleting', quota = NULL",
                (name, self._clock_ns()),
            )

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


def _insert_key(db: sqlite3.Connection, name: str, public: bytes, now: int) -> None:
    db.execute(
        "INSERT INTO keys (tenant, kid, public, created_ns) VALUES (?, ?, ?, ?)",
        (name, key_id(public), public, now),
    )


def _get(db: sqlite3.Connection, name: str) -> Tenant | None:
    row = db.execute(
        "SELECT name, state, created_ns, quota FROM tenants WHERE name = ? AND state <> 'deleted'",
        (name,),
    ).fetchone()
    if row is None:
        return None
    keys = db.execute(
        "SELECT kid, public, created_ns, expires_ns FROM keys WHERE tenant = ? "
        "ORDER BY created_ns DESC, kid",
        (name,),
    ).fetchall()
    name, state, created_ns, quota = row
    return Tenant(name, TenantState(state), created_ns, quota, tuple(PublicKey(*k) for k in keys))


def _existing(db: sqlite3.Connection, name: str) -> Tenant:
    found = _get(db, name)
    if found is None:
        raise UnknownTenantError(f"there is no tenant {name}", "see `betrace tenants list`")
    return found


def _active(db: sqlite3.Connection, name: str) -> Tenant:
    found = _existing(db, name)
    if found.state is not TenantState.ACTIVE:
        raise TenantConflictError(
            f"the tenant {name} is being deleted", "wait until the deletion is done"
        )
    return found
