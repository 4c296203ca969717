"""The daily task in the running service, and the command line."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import trio
import trio.testing
from click.testing import CliRunner

from betrace.service.cli.main import cli
from betrace.service.config.settings import Settings
from betrace.service.export import daily as daily_module
from betrace.service.export.archiver import Archiver, archive_directory, today
from betrace.service.export.daily import Daily
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.log import SpanLog
from tests.service.export.test_archiver import DAY, frame, save
from tests.support.inprocess import running, settings

pytestmark = pytest.mark.slow


def old_log(data: Path, days: int = 3) -> None:
    """A log of ``days`` days from :data:`DAY` on, and checkpoints after it."""
    with SpanLog(data) as log:
        for offset in range(days):
            last = log.append("acme", [frame(DAY + timedelta(days=offset))])[0]
    for taken in (1, 2):
        save(data, {"acme": (last, [])}, taken)


def daily(config: Settings, log: SpanLog, store: DuckStore) -> Daily:
    """The daily task of one process."""
    data, most = config.storage.path, config.ingest.max_body_bytes
    directory = archive_directory(config)
    return Daily(config, store, lambda: Archiver(log, directory, data / "checkpoints", most))


def archived(data: Path) -> list[int]:
    return [pq.read_metadata(path).num_rows for path in sorted(data.rglob("*.parquet"))]


async def test_a_run_archives_and_then_releases(tmp_path: Path) -> None:
    config = settings(tmp_path, archive={"enabled": True}, retention={"log_days": 7})
    old_log(config.storage.path)
    with SpanLog(config.storage.path) as log, DuckStore(config.storage.path) as store:
        task = daily(config, log, store)
        try:
            assert await task.run()
            assert task.spans == 9
            assert task.files == 3
            assert len(log.segments("acme")) == 1  # the newest stays
            assert task.released_bytes > 0
            assert task.succeeded_at == pytest.approx(time.time(), abs=60)
            assert await task.run()
            assert task.files == 3
        finally:
            task.close()
    assert archived(config.storage.path) == [3, 3, 3]


async def test_nothing_is_released_when_the_archive_cannot_be_written(tmp_path: Path) -> None:
    config = settings(tmp_path, archive={"enabled": True}, retention={"log_days": 7})
    old_log(config.storage.path)
    (config.storage.path / "archive").write_text("a file is in the way")
    with SpanLog(config.storage.path) as log, DuckStore(config.storage.path) as store:
        task = daily(config, log, store)
        try:
            assert not await task.run()
            assert task.failures == 1
            assert task.succeeded_at is None
            assert len(log.segments("acme")) == 3
        finally:
            task.close()


async def test_it_runs_soon_after_the_start_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_module, "FIRST_AFTER_SECONDS", 0.05)
    config = settings(tmp_path, archive={"enabled": True})
    old_log(config.storage.path)
    for path in (config.storage.path / "checkpoints").iterdir():
        path.unlink()
    async with running(config) as service:
        with trio.fail_after(60):
            while service.daily.succeeded_at is None:
                await trio.sleep(0.05)
        assert service.daily.spans == 9
        assert b"betrace_archive_spans_total 9.0" in await service.tools.exposition.scrape()


async def test_it_runs_every_day_and_after_a_failure_within_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    config = settings(tmp_path, archive={"enabled": True, "hour_utc": 3})
    begin = datetime(2025, 1, 31, 2, 0, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time", lambda: begin + trio.current_time() - started)
    runs: list[float] = []
    outcomes = [True, False, True, True]

    async def run(_: Daily) -> bool:
        runs.append(time.time() - begin)
        return outcomes[len(runs) - 1] if len(runs) <= len(outcomes) else True

    monkeypatch.setattr(Daily, "run", run)
    with SpanLog(config.storage.path) as log, DuckStore(config.storage.path) as store:
        task = daily(config, log, store)
        started = trio.current_time()
        with trio.move_on_after(3 * 86_400):
            await task.every_day()
        task.close()
    hour, day, soon = 3600, 86_400, 60
    at_three = hour + 5 * 60
    assert runs == pytest.approx(
        [soon, at_three, at_three + hour, at_three + day, at_three + 2 * day], abs=1
    )


async def test_it_ends_if_nothing_is_configured(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with SpanLog(config.storage.path) as log, DuckStore(config.storage.path) as store:
        task = daily(config, log, store)
        with trio.fail_after(60):
            await task.every_day()
        task.close()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["archive", *arguments])


def test_the_command_writes_files_and_prints_their_paths(tmp_path: Path) -> None:
    old_log(tmp_path)
    result = run("--data", str(tmp_path), "--json", "--before", "2025-02-02")
    assert result.exit_code == 0, result.output
    files = [json.loads(line) for line in result.stdout.splitlines()]
    assert [file["spans"] for file in files] == [3, 3]
    assert all(Path(file["path"]).stat().st_size == file["bytes"] for file in files)
    again = run("--data", str(tmp_path))
    assert "3 spans in 1 new files" in again.stderr


def test_the_command_releases_what_is_past_retention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_log(tmp_path)
    monkeypatch.setenv("BETRACE_RETENTION__LOG_DAYS", "30")
    result = run("--data", str(tmp_path))
    assert result.exit_code == 0
    assert "bytes of the log that were past retention" in result.stderr
    with SpanLog(tmp_path) as log:
        assert len(log.segments("acme")) == 1


def test_while_the_service_runs_the_command_only_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_log(tmp_path)
    monkeypatch.setenv("BETRACE_RETENTION__LOG_DAYS", "30")
    with SpanLog(tmp_path) as log:
        result = run("--data", str(tmp_path))
        assert result.exit_code == 0
        assert "the running service deletes" in result.stderr
        assert len(log.segments("acme")) == 3
    assert archived(tmp_path) == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--data", "nowhere"], 3, "no data in nowhere"),
        (["--tenant", "nobody"], 3, "no spans; tenants with spans: acme"),
        (["--before", (today() + timedelta(days=2)).isoformat()], 2, "today is not over"),
    ],
)
def test_the_command_explains_errors(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    old_log(tmp_path)
    result = run("--data", str(tmp_path), *arguments)
    assert result.exit_code == code
    assert said in result.stderr
