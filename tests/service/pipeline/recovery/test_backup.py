"""What a backup contains, and what cannot be backed up or restored."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from betrace.service.cli.main import cli
from betrace.service.pipeline.recovery import backup
from betrace.service.pipeline.recovery.backup import BackupError, back_up, read_manifest, restore
from betrace.service.storage.lockfile import LockFile
from betrace.service.storage.spanlog.log import LOCK_FILE

FILES = {
    "acme/log/2026-11-29/00000001.seg": "spans",
    "archive/tenant=acme/x.parquet": "old spans",
    "checkpoints/0002.checkpoint": "state",
    "export/otlp.json": "progress",
    "fallback/ledger/1": "signal",
    "log/log/2026-11-29/00000001.seg": "spans of a tenant called log",
    "rules/acme/rule.yaml": "rule",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory of a process that has stopped."""
    directory = tmp_path / "data"
    ignored = {LOCK_FILE: "1", "rules/x.new": "", "acme/betrace.duckdb": "rows"}
    for name, text in (FILES | ignored).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("ledger.sqlite", "dead-letters.sqlite"):
        with closing(sqlite3.connect(directory / name)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("CREATE TABLE t AS SELECT 1 AS a")
    return directory


def test_a_backup_has_every_file_and_can_be_restored(data: Path, tmp_path: Path) -> None:
    copied: list[int] = []
    made = back_up(data, tmp_path / "b", "0.2.0", copied.append)
    assert sum(copied) == made.bytes
    assert made.duckdb
    expected = {*FILES, "acme/betrace.duckdb", "ledger.sqlite", "dead-letters.sqlite"}
    assert set(made.files) == expected
    assert read_manifest(tmp_path / "b") == made
    (tmp_path / "new").mkdir()
    assert restore(tmp_path / "b", tmp_path / "new") == made
    for name, text in FILES.items():
        assert (tmp_path / "new" / name).read_text() == text
    with closing(sqlite3.connect(tmp_path / "new" / "ledger.sqlite")) as db:
        assert db.execute("SELECT a FROM t").fetchall() == [(1,)]


def test_the_order_is_that_of_a_crash(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    for name in ("_copy_file", "_copy_sqlite"):
        copy = getattr(backup, name)

        def noted(source: Path, *rest: object, copy=copy) -> object:  # type: ignore[no-untyped-def]
            copied.append(source.relative_to(data).parts[0])
            return copy(source, *rest)

        monkeypatch.setattr(backup, name, noted)
    with LockFile(data / LOCK_FILE):
        back_up(data, tmp_path / "b", "0.2.0")
    early = ["checkpoints", "dead-letters.sqlite", "export", "fallback", "ledger.sqlite"]
    assert copied == [*early, "archive", "rules", "acme", "log"]


def test_without_duckdb_while_it_runs_and_without_the_archive(data: Path, tmp_path: Path) -> None:
    with LockFile(data / LOCK_FILE):
        made = back_up(data, tmp_path / "b", "0.2.0", archive=False)
    assert not made.duckdb
    assert {name for name in made.files if "duckdb" in name or "archive" in name} == set()


def test_a_checkpoint_meanwhile_means_another_try(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, numbers = backup._copy_sqlite, iter(range(3, 100))

    def save(source: Path, *rest: object) -> object:
        number = next(numbers)
        if source.name == "dead-letters.sqlite" and number < limit:
            (data / f"checkpoints/{number:04}.checkpoint").write_text("newer")
        return copy(source, *rest)  # type: ignore[arg-type]

    limit = 5
    monkeypatch.setattr(backup, "_copy_sqlite", save)
    made = back_up(data, tmp_path / "b", "0.2.0")
    assert (
        "checkpoints/0004.checkpoint" in made.files or "checkpoints/0003.checkpoint" in made.files
    )
    limit = 100
    with pytest.raises(BackupError, match="changed during each of 5 tries"):
        back_up(data, tmp_path / "c", "0.2.0")
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".c*"))


def test_what_cannot_be_backed_up(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="not a data directory"):
        back_up(tmp_path, tmp_path / "b", "0.2.0")
    with pytest.raises(BackupError, match="inside the data directory"):
        back_up(data, data / "b", "0.2.0")
    (data / "rules" / "link").symlink_to("/tmp")
    with pytest.raises(BackupError, match="link is a symbolic link"):
        back_up(data, tmp_path / "b", "0.2.0")
    (tmp_path / "b").mkdir()
    with pytest.raises(BackupError, match="exists"):
        back_up(data, tmp_path / "b", "0.2.0")


def test_what_cannot_be_restored(data: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "b", tmp_path / "new"
    back_up(data, source, "0.2.0")
    with pytest.raises(BackupError, match="is not empty"):
        restore(source, data)
    with pytest.raises(BackupError, match="is not a backup"):
        restore(data, target)
    manifest = source / "backup.json"
    written = json.loads(manifest.read_bytes())
    wrong = [
        ("{", "is damaged"),
        (json.dumps(written | {"format": 2}), "newer format"),
        (json.dumps(written | {"files": {"../x": [1, ""]}}), "outside of the backup"),
        (json.dumps(written | {"files": {"gone": [1, ""]}}), "is missing"),
        (json.dumps(written | {"files": {"export/otlp.json": [8, "0"]}}), "is damaged"),
    ]
    for text, message in wrong:
        manifest.write_text(text)
        with pytest.raises(BackupError, match=message):
            restore(source, target)
        assert not target.exists()
        assert not list(tmp_path.glob(".new*"))


def test_the_commands(data: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(cli, [str(each) for each in arguments])
        return result.exit_code, result.output

    there = tmp_path / "b"
    assert run("backup", there, "--data", data) == (0, f"{there}: 10 files, 16,453 bytes\n")
    assert run("backup", there, "--data", data)[0] == 3
    code, output = run("restore", there, "--data", tmp_path / "new")
    assert (code, "betrace serve --data" in output) == (0, True)
    code, output = run("restore", there, "--data", tmp_path / "other", "--json")
    assert (code, json.loads(output)["files"]) == (0, 10)
    code, output = run("restore", there, "--data", data)
    assert (code, "is not empty" in output) == (3, True)
    (data / "ledger.sqlite").write_bytes(b"x" * 8192)
    code, output = run("backup", tmp_path / "c", "--data", data)
    assert (code, "an SQLite file cannot be copied" in output) == (3, True)
