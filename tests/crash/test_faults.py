"""Damage between runs of the real service, and faults during them. At the end, the oracle confirms
that nothing acknowledged is lost or duplicated.

Each test takes half a minute. A plain run has one of them, ``BETRACE_LONG=1`` all.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.campaign import Campaign
from tests.support.process import wait_for

pytestmark = pytest.mark.slow

long_run = pytest.mark.skipif(
    not os.environ.get("BETRACE_LONG"), reason="takes long; BETRACE_LONG=1 runs it"
)


def duckdb_files_gone(data: Path) -> None:
    files = list(data.glob("*/betrace.duckdb*"))
    assert files
    for path in files:
        path.unlink()


def one_duckdb_file_damaged(data: Path) -> None:
    path = min(data.glob("*/betrace.duckdb"))
    path.with_name(path.name + ".wal").unlink(missing_ok=True)
    path.write_bytes(b"this was a database" * 1000)


def checkpoints(data: Path) -> list[Path]:
    found = sorted((data / "checkpoints").glob("*.checkpoint"))
    assert found
    return found


def newest_checkpoint_damaged(data: Path) -> None:
    newest = checkpoints(data)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def newest_checkpoint_cut(data: Path) -> None:
    newest = checkpoints(data)[-1]
    os.truncate(newest, newest.stat().st_size // 2)


def checkpoints_gone(data: Path) -> None:
    shutil.rmtree(data / "checkpoints")


def checkpoints_and_duckdb_gone(data: Path) -> None:
    checkpoints_gone(data)
    duckdb_files_gone(data)


def segment_tails_torn(data: Path) -> None:
    """Append a partial frame, as if a power cut had interrupted a write."""
    for tenant in data.glob("*/log"):
        segments = sorted(tenant.glob("*/*.seg"), key=lambda path: path.stem)
        whole = segments[-1].read_bytes()
        with segments[-1].open("ab") as file:
            file.write(whole[32 : 32 + random.Random(1).randrange(1, min(200, len(whole) - 32))])


def segment_tails_noisy(data: Path) -> None:
    for tenant in data.glob("*/log"):
        segments = sorted(tenant.glob("*/*.seg"), key=lambda path: path.stem)
        with segments[-1].open("ab") as file:
            file.write(random.Random(2).randbytes(5000))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(duckdb_files_gone, marks=long_run),
        pytest.param(one_duckdb_file_damaged, marks=long_run),
        pytest.param(newest_checkpoint_damaged, marks=long_run),
        pytest.param(newest_checkpoint_cut, marks=long_run),
        pytest.param(checkpoints_gone, marks=long_run),
        checkpoints_and_duckdb_gone,
        pytest.param(segment_tails_torn, marks=long_run),
        pytest.param(segment_tails_noisy, marks=long_run),
    ],
)
def test_files_damaged_while_stopped(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with Campaign(tmp_path, seed=11) as campaign:
        time.sleep(4)
        campaign.victim.kill()
        damage(campaign.victim.data)
        campaign.victim.start()
        campaign.victim.wait_ready()
        time.sleep(2)
        campaign.verify()
    assert "Traceback" not in campaign.victim.log()


@contextmanager
def faulty(directory: Path, rate: float = 60.0, **settings: str) -> Iterator[tuple[Campaign, Path]]:
    """Run a campaign whose service has injectable faults; the path is their directory."""
    faults = directory / "faults"
    faults.mkdir()
    entry = ("-m", "tests.crash.faulty")
    settings |= {"faults": str(faults)}
    with Campaign(directory, 21, rate, entry=entry, **settings) as campaign:
        yield campaign, faults


@long_run
@pytest.mark.parametrize("fault", ["error", "hang", "duckdb-error"])
def test_a_crash_during_a_store_outage(tmp_path: Path, fault: str) -> None:
    with faulty(tmp_path) as (campaign, faults):
        time.sleep(1)
        (faults / fault).touch()
        name = "duckdb" if fault == "duckdb-error" else "ledger"
        files = campaign.victim.data / "fallback" / name
        wait_for(lambda: list(files.glob("*.jsonl")), 30)
        time.sleep(2)
        campaign.victim.kill()
        campaign.victim.start()
        campaign.victim.wait_ready()
        time.sleep(2)
        (faults / fault).unlink()
        campaign.verify()
        assert not list(files.glob("*.jsonl")), "not everything was written back"


@long_run
def test_the_ledger_file_is_locked_by_another_program(tmp_path: Path) -> None:
    with Campaign(tmp_path, 31) as campaign:
        time.sleep(1)
        other = sqlite3.connect(campaign.victim.data / "ledger.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        files = campaign.victim.data / "fallback" / "ledger"
        wait_for(lambda: list(files.glob("*.jsonl")), 30)
        other.execute("ROLLBACK")
        other.close()
        campaign.verify()


@long_run
def test_nothing_is_acknowledged_while_the_log_cannot_be_written(tmp_path: Path) -> None:
    with faulty(tmp_path) as (campaign, faults):
        time.sleep(2)
        (faults / "full").touch()
        time.sleep(0.3)  # for answers in transit
        before = campaign.clients.acknowledged
        time.sleep(2)
        assert campaign.clients.acknowledged == before
        assert campaign.clients.statuses["503"]
        campaign.victim.get("/api/performance/metrics")
        campaign.victim.kill()
        campaign.victim.start()
        campaign.victim.wait_ready()
        time.sleep(1)
        (faults / "full").unlink()
        campaign.verify()
    assert "Traceback" not in campaign.victim.log()


@long_run
def test_the_accounts_add_up_in_overload_and_with_dead_letters(tmp_path: Path) -> None:
    """At any time, accepted spans are evaluated, in flight, or in dead letters."""
    names = ("ingest_capacity", "correlate_capacity", "ingest_batch", "correlate_batch")
    few = {f"pipeline__{name}_spans": "200" for name in names}
    with faulty(tmp_path, rate=300.0, **few) as (campaign, faults):
        (faults / "slow").touch()
        wait_for(lambda: campaign.clients.statuses["503"] > 20, 60)
        (faults / "fold-error").touch()
        wait_for(lambda: campaign.accounts.most_dead > 0, 60)
        time.sleep(2)  # for some dead letters to be retried
        campaign.victim.kill()
        campaign.victim.start()
        campaign.victim.wait_ready()
        time.sleep(1)
        (faults / "fold-error").unlink()
        (faults / "slow").unlink()
        campaign.verify()
    assert campaign.accounts.samples > 20
    assert campaign.accounts.most_in_flight > 0


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[None]:
    """Mount a small file system on ``directory``, or skip the test without the permission."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "betrace-test", str(directory)]
    mount = subprocess.run(["mount", *options], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@long_run
def test_a_full_disk(tmp_path: Path) -> None:
    """Everything fails at once: log, ledger, DuckDB, fallback files, checkpoints."""
    disk = tmp_path / "disk"
    with small_disk(disk, 64), Campaign(disk, 41) as campaign:
        time.sleep(2)
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
        wait_for(lambda: campaign.clients.statuses["503"], 30)
        time.sleep(3)
        campaign.victim.get("/api/performance/metrics")
        campaign.victim.kill()
        ballast.unlink()
        campaign.victim.start()
        campaign.victim.wait_ready()
        time.sleep(1)
        campaign.verify()
