"""Checks of the stored data: rules, span log, checkpoint, ledger, DuckDB. Read-only, and bounded
unless everything is to be read."""

from __future__ import annotations

import math
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import duckdb

from betrace.service.cli.doctor.finding import FAILED, OK, WARNING, Finding, size
from betrace.service.cli.doctor.machine import owner
from betrace.service.cli.rules import rules_directory, shared_rules_directory
from betrace.service.config.base import split_address
from betrace.service.config.settings import Settings
from betrace.service.rules.store import RuleStore
from betrace.service.storage.duck.blocks import checked_blocks
from betrace.service.storage.duck.schema import FILE, TABLES
from betrace.service.storage.ledger.base import AMOUNT, tenant_account
from betrace.service.storage.ledger.open import LEDGER_FILE
from betrace.service.storage.ledger.sqlite_rows import SCHEMA
from betrace.service.storage.paths import tenant_directory, tenants_with
from betrace.service.storage.spanlog.frames import pack_position
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.checkpoint import checkpoint_files, read_checkpoint

_MOST_TENANTS = 100  # whose files are opened: the ones written last
_MOST_SECONDS = 20.0  # of one check
_AGAIN_SECONDS = 1.0  # before a block that looks wrong is read again
_MOST_PLACES = 10  # damaged places of the log that are listed
_DAMAGED = "check the disk, and see BetraceSpanLogDamaged in docs/runbook.md"
_CUT_OFF = "nothing, if a crash interrupted the last write: the start cuts it off"
_OLD_CHECKPOINT_SECONDS = 300.0  # as BetraceCheckpointOld


def rules(settings: Settings) -> Iterator[Finding]:
    """Whether all rule files are valid."""
    path = rules_directory(settings)
    if not path.is_dir():
        if settings.rules.directory or path != settings.storage.path / "rules":
            remedy = "create it, or set rules.directory"
            yield Finding("rules", FAILED, f"the directory {path} does not exist", remedy)
        else:
            yield Finding("rules", OK, "there are no rules yet")
        return
    store = RuleStore(path, shared_rules_directory(settings))
    store.load()
    for problem in store.problems.values():
        yield Finding("rules", WARNING, problem, f"betrace rules check {path}")
    if not store.problems:
        yield Finding("rules", OK, f"all files in {path} are valid")


def span_log(settings: Settings, everything: bool = False) -> Iterator[Finding]:
    """Whether the tenants' logs can be read, newest segments first."""
    data = settings.storage.path
    running = owner(data) is not None
    deadline = time.monotonic() + (math.inf if everything else _MOST_SECONDS)
    frames = spans = 0
    with closing(SpanLog(data, read_only=True)) as log:
        tenants = log.tenants()
        newest = -1 if running else None  # what is being written looks damaged
        segments = [
            (tenant, segment)
            for tenant in (tenants if everything else _latest(data, tenants, "log"))
            for segment in log.segments(tenant)[:newest]
        ]
        segments.sort(key=lambda each: each[1].day, reverse=True)
        looked = 0
        for tenant, segment in segments:
            if time.monotonic() > deadline:
                break
            start, stop = (pack_position(segment.number, at) for at in (0, segment.bytes))
            for _, frame in log.frames(tenant, start=start, stop=stop):
                frames, spans = frames + 1, spans + frame.spans
            looked += 1
        damaged = list(log.skipped)
    for skipped in damaged[:_MOST_PLACES]:
        text = (
            f"{size(skipped.bytes)} at offset {skipped.offset} of segment {skipped.segment} of "
            f"{skipped.tenant} cannot be read ({skipped.reason}); lost: {skipped.lost}"
        )
        torn = skipped.reason.startswith("torn")
        yield Finding("span log", WARNING, text, _CUT_OFF if torn else _DAMAGED)
    if len(damaged) > _MOST_PLACES:
        text = f"{len(damaged) - _MOST_PLACES} more places cannot be read"
        yield Finding("span log", WARNING, text, _DAMAGED)
    if not damaged:
        text = f"{looked} of {len(segments)} segments of {len(tenants)} tenants, {frames} requests "
        text += f"with {spans} spans, can be read"
        text += "; the service writes the newest ones" if running else ""
        yield Finding("span log", OK, text)


def checkpoint(settings: Settings) -> Iterator[Finding]:
    """Whether the newest checkpoint is readable, and how old it is."""
    files = checkpoint_files(settings.storage.path / "checkpoints")
    if not files:
        yield Finding("checkpoint", OK, "no checkpoint yet; a start reads the whole log")
        return
    try:
        snapshot = read_checkpoint(files[0])
    except FileNotFoundError:  # the service has just replaced it
        yield Finding("checkpoint", OK, "a new one was just written")
        return
    except (OSError, ValueError, KeyError) as error:
        text = f"{files[0].name} cannot be read: {error}"
        remedy = "nothing: the start uses the one before it, or reads the whole log"
        yield Finding("checkpoint", WARNING, text, remedy)
        return
    age = time.time() - snapshot.taken_ns / 1e9
    text = f"{size(files[0].stat().st_size)}, {age:.0f} s old"
    if owner(settings.storage.path) is not None and age > _OLD_CHECKPOINT_SECONDS:
        remedy = "see BetraceCheckpointOld in docs/runbook.md"
        yield Finding("checkpoint", WARNING, text, remedy)
    else:
        yield Finding("checkpoint", OK, text)


def ledger(settings: Settings) -> Iterator[Finding]:
    """The SQLite file, which is the ledger or its journal, and TigerBeetle's replicas."""
    path = settings.storage.path / LEDGER_FILE
    if path.exists() and path.stat().st_size:
        yield _sqlite(path)
    elif tenants_with(settings.storage.path, FILE):
        text = f"{path} is missing, although DuckDB has files"
        remedy = "restore it from a backup, or, if it had signals, run `betrace ledger rebuild`"
        yield Finding("ledger", FAILED, text, remedy)
    else:
        yield Finding("ledger", OK, "no ledger yet")
    if settings.ledger.kind == "tigerbeetle":
        yield from _tigerbeetle(settings)


def _sqlite(path: Path) -> Finding:
    remedy = (
        "stop the service and restore the file from a backup, or move it away and run "
        "`betrace ledger rebuild`"
    )
    deadline = time.monotonic() + _MOST_SECONDS
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            (kind,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if kind != SCHEMA.application_id:
                return Finding("ledger", FAILED, f"{path} is not a ledger of BeTrace", remedy)
            if version > SCHEMA.version:
                text = f"{path} was written by a newer version ({version})"
                return Finding("ledger", FAILED, text, "run that version of BeTrace")
            database.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
            (result,) = database.execute("PRAGMA quick_check(1)").fetchone()
            (number,) = database.execute("SELECT count(*) FROM transfers").fetchone()
    except sqlite3.OperationalError as error:
        if time.monotonic() > deadline:
            return Finding("ledger", OK, f"{path} is too large to check quickly")
        return Finding("ledger", FAILED, f"{path} cannot be read: {error}", remedy)
    except sqlite3.DatabaseError as error:
        return Finding("ledger", FAILED, f"{path} is damaged: {error}", remedy)
    if result != "ok":
        return Finding("ledger", FAILED, f"{path} is damaged: {result}", remedy)
    return Finding("ledger", OK, f"{path}, {number} transfers")


def _tigerbeetle(settings: Settings) -> Iterator[Finding]:
    limits = settings.ledger.tigerbeetle
    reached = 0
    addresses = [each.strip() for each in limits.addresses.split(",")]
    for address in addresses:
        try:
            socket.create_connection(split_address(address), limits.start_seconds).close()
        except OSError as error:
            text = f"TigerBeetle at {address} does not answer: {error.strerror or error}"
            remedy = "start it, or set ledger.tigerbeetle.addresses; signals wait meanwhile"
            yield Finding("ledger", FAILED, text, remedy)
        else:
            reached += 1
    if 2 * reached > len(addresses):
        journal = _journal(settings.storage.path / LEDGER_FILE)
        yield _ask_tigerbeetle(limits.addresses, limits.cluster_id, limits.start_seconds, journal)


def _journal(path: Path) -> dict[int, int]:
    """The number of transfers in the file, by account of some tenants."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT tenant, (debits + credits) / ? FROM accounts WHERE rule_id IS NULL LIMIT ?",
                (AMOUNT, _MOST_TENANTS),
            )
            return {tenant_account(tenant): transfers for tenant, transfers in rows}
    except sqlite3.Error:  # the check of the file reports it
        return {}


def _ask_tigerbeetle(
    addresses: str, cluster: int, seconds: float, journal: dict[int, int]
) -> Finding:
    try:
        import tigerbeetle as tb  # loads its library
    except ModuleNotFoundError:
        remedy = "install it with: pip install 'betrace[tigerbeetle]'"
        return Finding("ledger", FAILED, "the TigerBeetle client is not installed", remedy)

    answered = threading.Event()
    recorded: list[int] = []

    def ask() -> None:
        client = tb.ClientSync(cluster, addresses)
        accounts = client.lookup_accounts(list(journal) or [1])
        recorded.extend((a.debits_posted + a.credits_posted) // AMOUNT for a in accounts)
        answered.set()

    # A client waits forever for a cluster with another id, so the thread is abandoned.
    threading.Thread(target=ask, daemon=True).start()
    if answered.wait(seconds):
        text = f"TigerBeetle at {addresses} answers"
        expected = sum(journal.values())
        if sum(recorded) < expected:
            text += (
                f"; it lacks {expected - sum(recorded)} of {expected} transfers of the journal, "
                "which are older than its use: balances begin after them (docs/ledger.md)"
            )
        return Finding("ledger", OK, text)
    text = f"TigerBeetle at {addresses} did not answer a request within {seconds:g} s"
    remedy = f"check that the cluster id is {cluster} (ledger.tigerbeetle.cluster_id) and that "
    return Finding("ledger", FAILED, text, remedy + "client and server have the same version")


def duckdb_files(settings: Settings, everything: bool = False) -> Iterator[Finding]:
    """Whether each tenant's file can be read."""
    data = settings.storage.path
    tenants = tenants_with(data, FILE)
    running = owner(data) is not None
    if running and everything:
        yield from _duckdb_blocks(data, tenants)
        return
    if running:
        text = f"the running service checks the files of {len(tenants)} tenants itself"
        yield Finding("DuckDB", OK, text)
        return
    deadline = time.monotonic() + (math.inf if everything else _MOST_SECONDS)
    looked, bad = 0, 0
    for tenant in tenants if everything else _latest(data, tenants, FILE):
        if time.monotonic() > deadline:
            break
        path = tenant_directory(data, tenant) / FILE
        looked += 1
        try:
            with duckdb.connect(str(path), read_only=True) as database:
                for table in TABLES:  # every block
                    database.execute(f"SELECT bit_xor(hash(t)) FROM {table} AS t").fetchone()
        except duckdb.Error as error:
            bad += 1
            text = f"{path} cannot be read: {str(error).splitlines()[0]}"
            remedy = (
                "nothing: the service moves it away and rebuilds it from the ledger and the log"
            )
            yield Finding("DuckDB", WARNING, text, remedy)
    if not bad:
        yield Finding("DuckDB", OK, f"the files of {looked} of {len(tenants)} tenants can be read")


def _duckdb_blocks(data: Path, tenants: list[str]) -> Iterator[Finding]:
    """Check the files by their blocks' checksums, because the running service has locked them. A
    block that is wrong twice was not just being written."""
    bad = blocks = 0
    for tenant in tenants:
        path = tenant_directory(data, tenant) / FILE
        wrong = []
        for offset, _, right in checked_blocks(path):
            blocks += 1
            if not right:
                wrong.append(offset)
        if wrong:
            time.sleep(_AGAIN_SECONDS)
            wrong = [at for at, _, right in checked_blocks(path) if not right and at in wrong]
        if wrong:
            bad += 1
            text = (
                f"{len(wrong)} blocks of {path} have a wrong checksum, at offset {wrong[0]} first"
            )
            remedy = "nothing: the service rebuilds the file when it reads such a block, unless "
            yield Finding("DuckDB", WARNING, text, remedy + "none of its rows are in use")
    if not bad:
        text = f"the checksums of {blocks} blocks in the files of {len(tenants)} tenants are right"
        yield Finding("DuckDB", OK, text)


def waiting(settings: Settings) -> Iterator[Finding]:
    """What waits in local files for a store."""
    files = list((settings.storage.path / "fallback").glob("*/*"))
    size_waiting = sum(path.stat().st_size for path in files if path.is_file())
    exported = settings.storage.path / "dead-letters-exported"
    moved = len(list(exported.iterdir())) if exported.is_dir() else 0
    if moved:
        remedy = "see BetraceDeadLettersExported in docs/runbook.md"
        yield Finding("waiting", WARNING, f"{moved} files of exported dead letters", remedy)
    if size_waiting:
        text = f"{size(size_waiting)} in local files wait for their store"
        remedy = "nothing while it is written back; see BetraceFallbackPending in docs/runbook.md"
        yield Finding("waiting", WARNING, text, remedy)
    if not size_waiting and not moved:
        yield Finding("waiting", OK, "nothing waits in local files")


def _latest(data: Path, tenants: list[str], name: str) -> list[str]:
    """The tenants written last, limited to :data:`_MOST_TENANTS`."""

    def written(tenant: str) -> float:
        return (tenant_directory(data, tenant) / name).stat().st_mtime

    return sorted(tenants, key=written, reverse=True)[:_MOST_TENANTS]
