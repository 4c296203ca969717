"""The archive of a cluster, on a real server."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.export import cluster_archiver
from betrace.service.export.cluster_archiver import ClusterArchiver
from betrace.service.export.parquet import archive_segment
from betrace.service.storage.jetstream.archive_progress import (
    ArchiveProgress,
    read_progress,
    write_progress,
)
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, pack
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.spans import SpanStreams
from tests.support.nats_servers import NatsServers, connected
from tests.support.spans import S, body

DAY_NS = 86_400 * 1_000_000_000
_numbers = itertools.count()


class Archived:
    """A cluster whose clock is two days ahead, so that today is over."""

    def __init__(self, client: NatsClient, settings: ClusterSettings, directory: Path) -> None:
        layout = Layout.of(settings)
        self.spans = SpanStreams(client, layout)
        self.config = ConfigBucket(client, layout.config_bucket)
        self.directory = directory

    async def append(self, partition: int, name: str, *tenants: str) -> date:
        """Append a message with two spans of each tenant. Returns its day."""
        now = time.time_ns()
        frames = [TenantFrame(each, now - DAY_NS, 2, body(S(1), S(2))) for each in tenants]
        sequence = await self.spans.append(partition, pack(Spans(frames)), name)
        message = await self.spans.get(partition, sequence)
        assert message is not None
        return datetime.fromtimestamp(message.time_ns / 1e9, UTC).date()

    async def run(self) -> ClusterArchiver:
        made = ClusterArchiver(
            self.spans, lambda: 2, self.config, self.directory, self.directory / "work", 1 << 20
        )
        before = datetime.now(UTC).date() + timedelta(days=5)
        await trio.to_thread.run_sync(lambda: list(made.archive(before)))
        return made

    def rows(self) -> dict[str, int]:
        """Rows by tenant, day and file."""
        return {
            str(path.relative_to(self.directory)): pq.read_metadata(path).num_rows
            for path in sorted(self.directory.rglob("*.parquet"))
        }


@pytest.fixture
def settings(shared_nats: NatsServers) -> ClusterSettings:
    return shared_nats.settings(prefix=f"archive{next(_numbers)}")


@pytest.fixture(autouse=True)
def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 2 * DAY_NS)
    monkeypatch.setattr(cluster_archiver, "time", later)


async def test_a_finished_day_is_archived_once(settings: ClusterSettings, tmp_path: Path) -> None:
    async with connected(settings) as client:
        cluster = Archived(client, settings, tmp_path)
        assert (await cluster.run()).done.files == 0
        first = await cluster.append(0, "a", "acme", "beta")
        day = await cluster.append(1, "b", "acme")
        if day != first:
            pytest.skip("it is midnight")
        left = tmp_path / f"tenant=acme/date={day}/cluster-00000009.parquet"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"left by a run that was interrupted")
        done = (await cluster.run()).done
        assert (done.files, done.spans, done.failures) == (2, 6, [])
        # Spans that an edge received before midnight are filed under the day of their message.
        assert cluster.rows() == {
            f"tenant=acme/date={day}/cluster-00000001.parquet": 4,
            f"tenant=beta/date={day}/cluster-00000001.parquet": 2,
        }
        progress = await read_progress(cluster.config)
        assert progress is not None
        assert progress.day >= day
        assert progress.next == {0: 2, 1: 2}
        assert (await cluster.run()).done.files == 0


async def test_what_came_later_is_not_archived_twice(
    settings: ClusterSettings, tmp_path: Path
) -> None:
    async with connected(settings) as client:
        cluster = Archived(client, settings, tmp_path)
        day = await cluster.append(0, "a", "acme")
        yesterday = ArchiveProgress(day - timedelta(days=1), {0: 2})
        await write_progress(cluster.config, yesterday)
        await cluster.append(0, "b", "acme")
        assert (await cluster.run()).done.spans == 2


async def test_two_nodes_never_archive_the_same(
    settings: ClusterSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(settings) as client:
        cluster = Archived(client, settings, tmp_path)
        day = await cluster.append(0, "a", "acme")

        def overtaken(*arguments: object) -> object:
            trio.run(write_progress, cluster.config, ArchiveProgress(day, {0: 2, 1: 1}))
            return archive_segment(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(cluster_archiver, "archive_segment", overtaken)
        [failure] = (await cluster.run()).done.failures
        assert "another node archives" in failure
        progress = await read_progress(cluster.config)
        assert progress is not None
        assert progress.day == day


async def test_a_failure_ends_the_run_without_progress(
    settings: ClusterSettings, tmp_path: Path
) -> None:
    async with connected(settings) as client:
        cluster = Archived(client, settings, tmp_path)
        await cluster.append(0, "a", "acme")
        (tmp_path / "tenant=acme").write_text("a file is in the way")
        [failure] = (await cluster.run()).done.failures
        assert "cannot be archived" in failure
        assert await read_progress(cluster.config) is None
