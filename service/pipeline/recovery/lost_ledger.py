"""A lost ledger: the start is refused, and the ledger is rebuilt from DuckDB.

The ledger is the record of signals, and nothing looks for recorded signals again. A service that
started with an empty one beside a full DuckDB would go on, and export, count and retract as if
earlier signals had never been.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson

from betrace.service.config.settings import Settings
from betrace.service.durable import replace_durably, write_atomically
from betrace.service.pipeline.letter_codec import decided_from_bytes
from betrace.service.signals import Signal, signal_id
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.base import PAGE, LedgerError
from betrace.service.storage.ledger.open import LEDGER_FILE
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.local_stores import LocalStores
from betrace.service.tenancy.directory import Hidden, TenantDirectory
from betrace.service.traces.checkpoint import checkpoint_files, read_checkpoint

_MOST_EPISODES = 1000
_REBUILDING = ".rebuilding"


def refuse_if_lost(data: Path, store: DuckStore, waiting: FallbackFiles) -> None:
    """Raise :exc:`LedgerError` if the ledger has no signals although DuckDB has some that are not
    ``waiting`` to be recorded. Call it before the ledger is opened, which creates the file."""
    path = data / LEDGER_FILE
    missing = not path.exists() or not path.stat().st_size
    if not missing and not _is_empty(path):
        return
    ids = {signal.id for signal in _waiting(waiting)}
    for tenant in store.tenants():
        try:
            lost = any(signal.id not in ids for signal in _stored(store, tenant))
        except StoreError:
            if not missing:  # a ledger that never had a signal
                continue
            raise
        if lost:
            raise LedgerError(
                f"{path} {'is missing' if missing else 'has no signals'}, but DuckDB has signals "
                f"of {tenant}: restore the file from a backup, or rebuild it with `betrace ledger "
                "rebuild` (docs/ledger.md); to give up all signals instead, move the tenants' "
                "betrace.duckdb files away, too",
                transient=False,
            )


def _is_empty(path: Path) -> bool:
    """Whether a ledger never had a signal. A damaged one is left to :class:`SqliteLedger`."""
    try:
        with closing(sqlite3.connect(path)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
            return not any(
                db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
                for table in ("transfers", "outgoing")
                if table in tables
            )
    except sqlite3.Error:
        return False


@dataclass(slots=True)
class LedgerRebuilt:
    """What :func:`rebuild_ledger` did."""

    tenants: int = 0
    signals: int = 0
    """Signals that the ledger did not have."""
    uncertain: list[str] = field(default_factory=list)
    """Ids of signals whose episode is unknown; they are recorded as if it were the first."""


def rebuild_ledger(
    settings: Settings,
    store: DuckStore,
    local: LocalStores,
    directory: TenantDirectory,
    exported: bool = False,
) -> LedgerRebuilt:
    """Record all signals of DuckDB, and of the files that wait for it, that the ledger lacks.

    A lost ledger is built beside its place and moved there when it is complete, so a stop leaves
    nothing half done. Its entries are numbered above all that checkpoints and exports know: a
    restart reads them again, and every destination gets them again, unless ``exported``.

    The service must not run. Raises :exc:`LedgerError`, and the store's errors.
    """
    data = settings.storage.path
    path = data / LEDGER_FILE
    lost = not path.exists() or not path.stat().st_size or _is_empty(path)
    place = path.with_name(LEDGER_FILE + _REBUILDING) if lost else path
    if lost:
        _remove(place)
    ledger = SqliteLedger(place)
    found = LedgerRebuilt()
    try:
        if lost:
            first = _known_entries(data, directory)
            ledger.number_after(first)
            for tenant, hidden in directory.hidden().items():
                directory.hide(tenant, Hidden(max(first, hidden.entry), 0))
        before = ledger.last_number()
        outgoing = settings.ledger.kind == "tigerbeetle"  # it may lack them, and ignores known ones
        record = ledger.add_outgoing if outgoing else ledger.record
        signals = _all_signals(store, local.duckdb)
        for pages in signals.values():
            found.tenants += 1
            for page in pages:
                record([_with_episode(signal, found.uncertain) for signal in page])
        number = ledger.last_number()
        found.signals = number - before
        last = {each: ledger.last_entry(each) for each in ledger.tenants()}
        if outgoing:  # entries are numbered once the cluster has them
            last = dict.fromkeys((*last, *signals), number)
    finally:
        ledger.close()
    if lost:
        _remove(path)
        replace_durably(place, path)
        _remove(place)
    if exported:
        for progress in (data / "export").glob("*.json"):
            write_atomically(progress, json.dumps(last).encode())
    return found


def _all_signals(store: DuckStore, waiting: FallbackFiles) -> dict[str, Iterator[list[Signal]]]:
    """By tenant: pages of its signals in DuckDB, then of those that wait for it."""
    behind: dict[str, list[Signal]] = {}
    for signal in _waiting_rows(waiting):
        behind.setdefault(signal.tenant, []).append(signal)

    def pages(tenant: str) -> Iterator[list[Signal]]:
        after = 0
        while page := store.signals_after(tenant, after, PAGE):
            after = page[-1].seq
            yield [stored.signal for stored in page]
        if tenant in behind:
            yield behind[tenant]

    return {tenant: pages(tenant) for tenant in sorted({*store.tenants(), *behind})}


def _stored(store: DuckStore, tenant: str) -> Iterator[Signal]:
    after = 0
    while page := store.signals_after(tenant, after, PAGE):
        after = page[-1].seq
        for stored in page:
            yield stored.signal


def _waiting(files: FallbackFiles) -> Iterator[Signal]:
    """The signals that wait for the ledger."""
    for lines in files.pages(PAGE):
        for line in lines:
            with suppress(LookupError, TypeError, ValueError):
                yield Signal.from_json(orjson.loads(line))


def _waiting_rows(files: FallbackFiles) -> Iterator[Signal]:
    """The signals that wait for DuckDB."""
    for lines in files.pages(PAGE):
        for line in lines:
            with suppress(LookupError, TypeError, ValueError):
                yield from decided_from_bytes(line).signals


def _with_episode(signal: Signal, uncertain: list[str]) -> Signal:
    """The signal with its episode, which DuckDB does not have, but which its id was made of."""
    for episode in range(_MOST_EPISODES):
        made = signal_id(
            signal.tenant,
            signal.rule_id,
            signal.rule_version,
            signal.trace_id,
            signal.kind,
            episode,
        )
        if made == signal.id:
            return replace(signal, episode=episode)
    uncertain.append(signal.id)
    return signal


def _known_entries(data: Path, directory: TenantDirectory) -> int:
    """The highest number of an entry that anything refers to."""
    numbers: list[int] = [hidden.entry for hidden in directory.hidden().values()]
    for path in checkpoint_files(data / "checkpoints"):
        with suppress(OSError, ValueError, KeyError):
            numbers += read_checkpoint(path).recorded.values()
    for path in (data / "export").glob("*.json"):
        with suppress(OSError, ValueError, AttributeError, TypeError):
            numbers += _whole(json.loads(path.read_text()).values())
    return max(numbers, default=0)


def _whole(values: Iterable[object]) -> list[int]:
    return [value for value in values if isinstance(value, int)]


def _remove(path: Path) -> None:
    """Delete a SQLite file and its log, which must not be applied to a new file."""
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
