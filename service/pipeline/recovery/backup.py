"""Copies of the data directory, taken while the service runs or after it stopped, and their
restoration.

A copy is a state from which the service could restart after a crash. Files are therefore copied in
an order: checkpoints and dead letters first, as a pair that no newer checkpoint separates; then the
progress of exports and alerts, the fallback files, and the ledger to which they are written; the
span log last. What is newer than the checkpoint is found again in the log, as after a crash, and
signals that the ledger already has change nothing.

DuckDB locks its files, so they are left out while the service runs. The service rebuilds them from
the ledger and the span log when it starts (:mod:`betrace.service.pipeline.recovery.rebuild`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import orjson

from betrace.service.durable import sync_directory
from betrace.service.storage.lockfile import LockedError, LockFile
from betrace.service.storage.spanlog.log import LOCK_FILE

MANIFEST = "backup.json"
CLUSTER_FILE = "cluster.json"
"""In the backup of a query node: what the whole cluster has in common. It is not restored to the
data directory."""
_FORMAT = 1
_TRIES = 5
_CHUNK = 1 << 20
_DUCKDB = ("betrace.duckdb", ".duckdb")  # what their files' and directories' names begin with
_LETTERS = "dead-letters.sqlite"

Progress = Callable[[int], None]  # gets the bytes of each step


class BackupError(RuntimeError):
    """A backup cannot be made or restored. The message says what to do."""


class _Changed(Exception):  # noqa: N818
    """A file that the copy needs was deleted meanwhile."""


@dataclass(slots=True)
class Backup:
    """What a backup contains."""

    taken_at: float
    """Seconds since 1970."""
    version: str
    """The program's."""
    duckdb: bool
    """Whether DuckDB's files are in it, so that nothing must be rebuilt."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By path: bytes, and the BLAKE2b digest in hexadecimal."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self.files.values())


def back_up(
    data: Path,
    to: Path,
    version: str,
    progress: Progress = lambda _: None,
    *,
    archive: bool = True,
    cluster: bytes | None = None,
) -> Backup:
    """Copy the data directory to the new directory ``to``, without ``archive/`` if that is not
    wanted. ``cluster`` becomes the file :data:`CLUSTER_FILE`. Blocks.

    Raises :exc:`BackupError`, :exc:`OSError`, and :exc:`sqlite3.Error` for a damaged file.
    """
    if not (data / LOCK_FILE).exists():
        raise BackupError(f"{data} is not a data directory of BeTrace; name it with --data")
    if to.exists():
        raise BackupError(f"{to} exists; name a directory that does not exist yet")
    if to.absolute().is_relative_to(data.absolute()):
        raise BackupError(f"{to} is inside the data directory; choose a place on another disk")
    part = to.with_name(f".{to.name}.part")
    try:
        owner = LockFile(data / LOCK_FILE)
    except LockedError:
        owner = None
    try:
        for _ in range(_TRIES):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            backup = Backup(time.time(), version, duckdb=owner is not None)
            with suppress(_Changed):
                _Copy(data, part, backup, progress, archive).run()
                if cluster is not None:
                    backup.files[CLUSTER_FILE] = _write_file(part / CLUSTER_FILE, cluster)
                break
        else:
            raise BackupError(
                f"{data} changed during each of {_TRIES} tries; try again when fewer tenants are "
                "deleted and less of the log is released"
            )
        _write_manifest(part, backup)
        part.rename(to)
        sync_directory(to.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        if owner is not None:
            owner.release()
    return backup


def restore(source: Path, data: Path, progress: Progress = lambda _: None) -> Backup:
    """Copy a backup to a data directory, which must be empty or missing. Each file is checked.
    Blocks. Raises :exc:`BackupError` or :exc:`OSError`; the data directory is then unchanged."""
    backup = read_manifest(source)
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise BackupError(f"{data} is not empty; move it away, or name another with --data")
    part = data.with_name(f".{data.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for name, (size, digest) in backup.files.items():
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                found = _copy_file(source / name, target, progress)
            except FileNotFoundError:
                raise BackupError(f"{source / name} is missing; use another backup") from None
            if found != (size, digest):
                raise BackupError(f"{source / name} is damaged; use another backup")
        (part / CLUSTER_FILE).unlink(missing_ok=True)
        _sync_directories(part)
        if data.exists():
            data.rmdir()
        part.rename(data)
        sync_directory(data.absolute().parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return backup


def read_manifest(source: Path) -> Backup:
    """What a backup contains. Raises :exc:`BackupError`."""
    try:
        read = orjson.loads((source / MANIFEST).read_bytes())
        if read["format"] != _FORMAT:
            raise BackupError(
                f"{source} was made by BeTrace {read['version']} in a newer format; upgrade"
            )
        files = {name: (int(size), str(digest)) for name, (size, digest) in read["files"].items()}
        backup = Backup(read["taken_at"], read["version"], read["duckdb"], files)
    except FileNotFoundError:
        raise BackupError(f"{source} is not a backup: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{source / MANIFEST} is damaged: {error}; use another backup") from None
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise BackupError(f"{source / MANIFEST} names a file outside of the backup: {name}")
    return backup


class _Copy:
    """One try to copy a data directory."""

    def __init__(
        self, data: Path, to: Path, backup: Backup, progress: Progress, archive: bool
    ) -> None:
        self._data = data
        self._to = to
        self._backup = backup
        self._progress = progress
        self._archive = archive

    def run(self) -> None:
        """Copy everything. Raises :exc:`_Changed`."""
        self._copy_checkpoints()
        listed = [path for path in self._walk(self._data) if path not in self._backup.files]
        for path in sorted(listed, key=_turn):
            if path.startswith("checkpoints/"):
                continue  # newer than those that were copied
            try:
                self._copy(path)
            except FileNotFoundError:
                if _turn(path)[0] == _LOG_TURN:
                    raise _Changed from None  # the checkpoint may need it
        _sync_directories(self._to)

    def _copy_checkpoints(self) -> None:
        """Copy the checkpoints and the dead letters. A letter is deleted once the newest checkpoint
        has its spans, so the letters must not be newer than that."""
        before = self._checkpoints()
        for name in before:
            try:
                self._copy(f"checkpoints/{name}")
            except FileNotFoundError:
                raise _Changed from None
        if (self._data / _LETTERS).exists():
            self._copy(_LETTERS)
        if self._checkpoints() != before:
            raise _Changed

    def _checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self._data / "checkpoints").glob("*.checkpoint"))

    def _walk(self, directory: Path) -> Iterator[str]:
        with os.scandir(directory) as entries:
            found = list(entries)
        for entry in found:
            path = Path(entry.path)
            if entry.name == LOCK_FILE or entry.name.endswith((".new", "-wal", "-shm")):
                continue  # of the process, half written, or part of an SQLite file
            if directory == self._data and entry.name == "archive" and not self._archive:
                continue
            if entry.name.startswith(_DUCKDB) and not self._backup.duckdb:
                continue
            if entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):  # a tenant that is being deleted
                    yield from self._walk(path)
            elif entry.is_symlink():
                raise BackupError(
                    f"{path} is a symbolic link, which a backup does not follow; replace it with "
                    "what it points to"
                )
            elif entry.is_file(follow_symlinks=False):
                yield path.relative_to(self._data).as_posix()

    def _copy(self, name: str) -> None:
        source, target = self._data / name, self._to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".sqlite"):
            found = _copy_sqlite(source, target, self._progress)
        else:
            found = _copy_file(source, target, self._progress)
        self._backup.files[name] = found


# Their files in this order; then the rest, then the log. What a query node has applied must not be
# newer than its ledger.
_TURNS = ("cursors.json", "export", "alerts", "fallback", "ledger")
_LOG_TURN = len(_TURNS) + 1


def _turn(name: str) -> tuple[int, str]:
    """When a file is copied."""
    parts = PurePosixPath(name).parts
    if "log" in parts[1:2]:
        return _LOG_TURN, name
    first = parts[0].removesuffix(".sqlite")
    return (_TURNS.index(first) if first in _TURNS else len(_TURNS)), name


def _copy_file(source: Path, target: Path, progress: Progress) -> tuple[int, str]:
    """Copy the bytes that a file has now, durably; returns their number and digest."""
    digest = hashlib.blake2b(digest_size=32)
    with source.open("rb") as read, target.open("wb") as write:
        left = os.fstat(read.fileno()).st_size
        size = 0
        while left and (chunk := read.read(min(left, _CHUNK))):
            write.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            left -= len(chunk)
            progress(len(chunk))
        write.flush()
        os.fsync(write.fileno())
    return size, digest.hexdigest()


def _write_file(path: Path, data: bytes) -> tuple[int, str]:
    """Write a file durably; returns its size and digest."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data), hashlib.blake2b(data, digest_size=32).hexdigest()


def _copy_sqlite(source: Path, target: Path, progress: Progress) -> tuple[int, str]:
    """Copy an SQLite file as it is between two transactions (`sqlite3_backup_init`)."""
    if not source.exists():
        raise FileNotFoundError(source)
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True)) as read,
        closing(sqlite3.connect(target)) as write,
    ):
        read.backup(write, pages=4096, sleep=0.01)
    size, digest = 0, hashlib.blake2b(digest_size=32)
    with target.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    progress(size)
    return size, digest.hexdigest()


def _sync_directories(top: Path) -> None:
    for directory, _, _ in os.walk(top):
        sync_directory(Path(directory))


def _write_manifest(directory: Path, backup: Backup) -> None:
    text = orjson.dumps(
        {
            "format": _FORMAT,
            "version": backup.version,
            "taken_at": backup.taken_at,
            "duckdb": backup.duckdb,
            "files": backup.files,
        },
        option=orjson.OPT_INDENT_2,
    )
    _write_file(directory / MANIFEST, text)
    sync_directory(directory)
