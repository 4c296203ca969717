"""Many logs made durable by one call, and what is told where that fails."""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from betrace.service.storage import filesystem
from betrace.service.storage.disk import Disk
from betrace.service.storage.filesystem import reliable, sync_filesystem
from betrace.service.storage.spanlog import sync as logsync
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import LogSyncError, SpanLog
from betrace.service.storage.spanlog.tenant_log import TenantLog

TENANTS = [f"t{k:02}" for k in range(logsync.MANY)]


class WatchedDisk:
    """Counts syncs; fails those of tenants in ``broken`` as a disk would: the next call for all
    tells that one failed, and the file's own sync does."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.foreign_failure = False
        self.seconds = 0.0
        self.files: list[str] = []
        self.together = 0
        self.disk = Disk(sync=self.sync, sync_filesystem=self.all)

    def sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.files.append(path.parts[-4])
        if path.parts[-4] in self.broken:
            raise OSError(errno.EIO, "disk on fire")
        os.fdatasync(descriptor)

    def all(self, descriptor: int) -> None:
        os.fstat(descriptor)
        self.together += 1
        time.sleep(self.seconds)
        if self.broken or self.foreign_failure:
            raise OSError(errno.EIO, "some write failed")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> WatchedDisk:
    monkeypatch.setattr(logsync, "reliable", lambda _: True)
    monkeypatch.setattr(logsync, "SLOW_SECONDS", 3600)
    return WatchedDisk()


def write(log: SpanLog, tenants: list[str] = TENANTS) -> None:
    for tenant in tenants:
        log.append(tenant, [Frame("protobuf", "", time.time_ns(), b"body", 1)])


def durable(log: SpanLog) -> set[str]:
    return {tenant for tenant in TENANTS if log.synced(tenant) == log.written(tenant) > 0}


def test_many_are_synced_by_one_call(tmp_path: Path, watched: WatchedDisk) -> None:
    with SpanLog(tmp_path, disk=watched.disk) as log:
        write(log)
        unsynced = log.statistics().unsynced_bytes
        assert log.sync() == unsynced > 0
        assert (watched.together, watched.files) == (1, [])
        assert durable(log) == set(TENANTS)
        write(log, TENANTS[1:])
        log.sync()
        assert watched.together == 1
        assert sorted(watched.files) == TENANTS[1:]  # too few


def test_a_failure_is_reported_to_the_affected_tenants(
    tmp_path: Path, watched: WatchedDisk
) -> None:
    with SpanLog(tmp_path, disk=watched.disk) as log:
        write(log)
        watched.broken = {"t03", "t07"}
        with pytest.raises(LogSyncError, match="disk on fire") as caught:
            log.sync()
        assert caught.value.tenants == {"t03", "t07"}
        assert durable(log) == set(TENANTS) - {"t03", "t07"}
        assert log.statistics().sync_failures == 2
        watched.broken = set()
        write(log)
        assert {tenant for tenant in TENANTS if len(log.segments(tenant)) == 2} == {"t03", "t07"}
        log.sync()
        assert durable(log) == set(TENANTS)


def test_a_failure_of_another_program_is_not_reported(tmp_path: Path, watched: WatchedDisk) -> None:
    with SpanLog(tmp_path, disk=watched.disk) as log:
        write(log)
        watched.foreign_failure = True
        assert log.sync() > 0
        assert sorted(watched.files) == TENANTS
        assert durable(log) == set(TENANTS)


def test_what_an_earlier_process_wrote_is_synced_by_file(
    tmp_path: Path, watched: WatchedDisk
) -> None:
    with SpanLog(tmp_path) as log:
        write(log)
    with SpanLog(tmp_path, disk=watched.disk) as log:
        write(log, [*TENANTS, *(f"u{k:02}" for k in range(logsync.MANY))])
        log.sync()
        assert watched.together == 1
        assert sorted(watched.files) == TENANTS
        assert durable(log) == set(TENANTS)
        write(log)
        log.sync()
        assert watched.together == 2


def test_a_busy_filesystem_is_left_alone_for_a_while(
    tmp_path: Path, watched: WatchedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logsync, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(logsync, "REST_SECONDS", 3600)
    watched.seconds = 0.02
    with SpanLog(tmp_path, disk=watched.disk) as log:
        write(log)
        log.sync()
        write(log)
        log.sync()
        assert (watched.together, len(watched.files)) == (1, len(TENANTS))
        assert log._syncer is not None
        log._syncer._rests_until = 0.0  # it has rested
        write(log)
        log.sync()
        assert watched.together == 2


def test_logs_on_another_filesystem_are_synced_by_file(
    tmp_path: Path, watched: WatchedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantLog, "on_device", lambda self, _: self.tenant != "t05")
    with SpanLog(tmp_path, disk=watched.disk) as log:
        write(log, [*TENANTS, "extra"])
        log.sync()
        assert (watched.together, watched.files) == (1, ["t05"])
        assert durable(log) == set(TENANTS)


def test_the_call_itself(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    sync_filesystem(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync_filesystem(descriptor)


@pytest.mark.parametrize(
    ("release", "system", "expected"),
    [("4.19.0", "Linux", False), ("odd", "Linux", False), ("6.1.0-1", "Darwin", False)],
)
def test_where_it_is_unreliable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, system: str, expected: bool
) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(platform, "system", lambda: system)
    assert reliable(tmp_path) is expected


def test_only_filesystems_known_to_report_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reliable(Path("/proc")) is False
    assert reliable(tmp_path / "nowhere") is False
    here: Callable[[], bool] = lambda: reliable(tmp_path)  # noqa: E731
    before = here()
    monkeypatch.setattr(filesystem, "_RELIABLE", frozenset())
    assert here() is False
    monkeypatch.undo()
    assert here() is before
