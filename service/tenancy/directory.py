"""The tenants that are known, with their public keys and quotas, in an SQLite file.

A tenant that is deleted stays known by name: what the ledger, which is append-only, has of it must
not come back into the query store. Methods block and may be called from any thread; they raise
:exc:`TenantError`, and :exc:`DirectoryError` where the disk fails.
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

from betrace.service.tenancy.tokens import key_id
from betrace.service.tenants import TENANT_RULE, is_tenant_name

SCHEMA_VERSION = 1
APPLICATION_ID = 0x42544E54  # "BTNT", for file(1)
MOST_KEYS = 16
"""Of a tenant, those in their grace included."""
_BUSY_SECONDS = 2.0

_SCHEMA = f"""
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
PRAGMA user_version = {SCHEMA_VERSION};
PRAGMA application_id = {APPLICATION_ID};
"""


class State(StrEnum):
    """Of a tenant in the directory."""

    ACTIVE = "active"
    DELETING = "deleting"
    DELETED = "deleted"


class TenantError(Exception):
    """What was asked for cannot be done with this tenant; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UnknownTenantError(TenantError):
    """There is no such tenant, or it has no such key."""


class TenantConflictError(TenantError):
    """The tenant is not as it must be: it exists, it is being deleted, it has too many keys."""


class DirectoryError(Exception):
    """The file did not do it; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key of a tenant: 32 bytes, and until when (nanoseconds since 1970; None: for good) its
    tokens count."""

    kid: str
    public: bytes
    created_ns: int
    expires_ns: int | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant in the directory. ``quota`` is in spans a second, 0 for no limit, None for that of
    the configuration."""

    name: str
    state: State
    created_ns: int
    quota: int | None
    keys: tuple[PublicKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the ledger has of a tenant from before it was deleted: its last entry then, and how many
    there were."""

    entry: int
    count: int


class TenantDirectory:
    """The directory in the file ``path``, made if missing."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._migrate()
            except BaseException:
                self._db.close()
                raise

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise DirectoryError(
                f"{self._path} was written by a newer program (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): upgrade, or choose another data directory"
            )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA secure_delete = ON")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DirectoryError(
                f"the tenants at {self._path}: {error}: check the disk's space and health"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            yield self._db

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    # Asking

    def get(self, name: str) -> Tenant | None:
        """A tenant that is active or being deleted."""
        with self._reading() as db:
            return _get(db, name)

    def page(self, after: str = "", limit: int = 1000) -> list[Tenant]:
        """The tenants that are active or being deleted, by name, with names beyond ``after``."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT name FROM tenants WHERE state <> 'deleted' AND name > ? "
                "ORDER BY name LIMIT ?",
                (after, limit),
            ).fetchall()
            return [tenant for (name,) in rows if (tenant := _get(db, name)) is not None]

    def in_state(self, *states: State) -> set[str]:
        """The names of the tenants in these states."""
        marks = ",".join("?" * len(states))
        with self._reading() as db:
            rows = db.execute(f"SELECT name FROM tenants WHERE state IN ({marks})", states)
            return {name for (name,) in rows}

    def quotas(self) -> dict[str, int]:
        """The quotas that were set."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT name, quota FROM tenants WHERE quota IS NOT NULL AND state = 'active'"
            )
            return dict(rows.fetchall())

    def hidden(self) -> dict[str, Hidden]:
        """By tenant that was ever deleted, what the ledger has of it from before."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT name, hidden_entry, hidden_count FROM tenants "
                "WHERE hidden_entry > 0 OR state <> 'active'"
            ).fetchall()
        return {name: Hidden(entry, count) for name, entry, count in rows}

    def public_key(self, name: str, kid: str) -> PublicKey | None:
        """A key of an active tenant that counts now."""
        with self._reading() as db:
            row = db.execute(
                "SELECT kid, public, keys.created_ns, expires_ns FROM keys "
                "JOIN tenants ON name = tenant WHERE tenant = ? AND kid = ? AND state = 'active'",
                (name, kid),
            ).fetchone()
        key = None if row is None else PublicKey(*row)
        return key if key is not None and self._counts(key) else None

    def _counts(self, key: PublicKey) -> bool:
        return key.expires_ns is None or key.expires_ns > self._clock_ns()

    # Changing

    def create(self, name: str, quota: int | None, public: bytes | None) -> Tenant:
        """Make a tenant, with its first key if given; one that was deleted begins anew. Raises
        :exc:`TenantConflictError` where it exists."""
        if not is_tenant_name(name):
            raise ValueError(TENANT_RULE)
        now = self._clock_ns()
        with self._changing() as db:
            found = _get(db, name)
            if found is not None:
                state = "is being deleted" if found.state is State.DELETING else "exists"
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
        """Add a key; the others count for ``grace_seconds`` more. Raises
        :exc:`UnknownTenantError` and :exc:`TenantConflictError`."""
        now = self._clock_ns()
        until = now + int(grace_seconds * 1e9)
        with self._changing() as db:
            tenant = _active(db, name)
            kid = key_id(public)
            if any(key.kid == kid for key in tenant.keys):
                raise TenantConflictError(f"the tenant {name} has this key", "make a new key")
            db.execute("DELETE FROM keys WHERE tenant = ? AND expires_ns <= ?", (name, now))
            left = db.execute("SELECT count(*) FROM keys WHERE tenant = ?", (name,)).fetchone()
            if left[0] >= MOST_KEYS:
                raise TenantConflictError(
                    f"the tenant {name} has {MOST_KEYS} keys, as many as it may",
                    "revoke one of them first",
                )
            db.execute(
                "UPDATE keys SET expires_ns = min(coalesce(expires_ns, ?), ?) WHERE tenant = ?",
                (until, until, name),
            )
            _insert_key(db, name, public, now)
            return _existing(db, name)

    def revoke_key(self, name: str, kid: str) -> Tenant:
        """Remove a key: its tokens no longer count. Raises :exc:`UnknownTenantError`."""
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
        """Note that a tenant, which need not be known, is to be deleted: from now on it has no keys
        and no quota."""
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
        """Note what the ledger has of a tenant that is being deleted."""
        with self._changing() as db:
            db.execute(
                "UPDATE tenants SET hidden_entry = ?, hidden_count = ? WHERE name = ?",
                (hidden.entry, hidden.count, name),
            )

    def finish_deletion(self, name: str) -> None:
        """Note that nothing is left of a tenant but its entries in the ledger."""
        with self._changing() as db:
            db.execute("UPDATE tenants SET state = 'deleted' WHERE name = ?", (name,))

    def close(self) -> None:
        """Close the file. Twice does no harm."""
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
    return Tenant(row[0], State(row[1]), row[2], row[3], tuple(PublicKey(*key) for key in keys))


def _existing(db: sqlite3.Connection, name: str) -> Tenant:
    found = _get(db, name)
    if found is None:
        raise UnknownTenantError(f"there is no tenant {name}", "see `betrace tenants list`")
    return found


def _active(db: sqlite3.Connection, name: str) -> Tenant:
    found = _existing(db, name)
    if found.state is not State.ACTIVE:
        raise TenantConflictError(f"the tenant {name} is being deleted", "wait until it is gone")
    return found
