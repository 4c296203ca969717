"""``betrace archive`` on a cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from betrace.service.cli.common import Failure, with_client

if TYPE_CHECKING:
    from betrace.service.config.cluster import ClusterSettings
    from betrace.service.config.settings import Settings
    from betrace.service.export.archiver import ArchiveResult
    from betrace.service.export.cluster_archiver import ClusterArchiver
    from betrace.service.export.parquet import Archived
    from betrace.service.storage.jetstream.client import NatsClient

_PATIENCE = 2  # times the lease, so that the lease of a node that was killed expires


def archive_cluster(
    settings: Settings, section: ClusterSettings, before: date, show: Callable[[Archived], None]
) -> ArchiveResult:
    """Archive the days before ``before`` that no node has archived yet. Raises :exc:`Failure` if
    another process archives."""
    import trio

    from betrace.service.app.archive import DUTY
    from betrace.service.app.query import duty_times
    from betrace.service.cluster.duty import Duty
    from betrace.service.cluster.lease_keys import owners_by_duty
    from betrace.service.export.archiver import archive_directory
    from betrace.service.export.cluster_archiver import ClusterArchiver
    from betrace.service.storage.jetstream.bucket import ConfigBucket
    from betrace.service.storage.jetstream.layout import Layout
    from betrace.service.storage.jetstream.leases import Leases
    from betrace.service.storage.jetstream.setup import generations_of
    from betrace.service.storage.jetstream.spans import SpanStreams

    layout = Layout.of(section)

    async def work(client: NatsClient) -> ArchiveResult:
        leases = ConfigBucket(client, layout.leases_bucket)
        config = ConfigBucket(client, layout.config_bucket)
        generations = await generations_of(config, section)
        name = f"command-{socket.gethostname().partition('.')[0]}-{os.getpid()}"
        times = duty_times(section)
        duty = Duty(leases, DUTY, name, times)
        archiver = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(duty.run)
            with trio.move_on_after(_PATIENCE * times.lease_seconds):
                await duty.wait_held()
            if duty.held:
                with TemporaryDirectory(prefix="betrace-archive-") as directory:
                    archiver = ClusterArchiver(
                        SpanStreams(client, layout),
                        lambda: generations.total,
                        config,
                        archive_directory(settings),
                        Path(directory) / "log",
                        settings.ingest.max_body_bytes,
                    )
                    await trio.to_thread.run_sync(_run, archiver, before, show)
            await duty.stop()
        if archiver is None:
            owners = owners_by_duty(await Leases(leases, section.lease_seconds).owners())
            raise Failure(
                f"{owners.get(DUTY, 'another node')} archives this cluster once a day, because "
                "archive.enabled is true there; stop it, or let it do so"
            )
        return archiver.done

    return with_client(section, work)


def _run(archiver: ClusterArchiver, before: date, show: Callable[[Archived], None]) -> None:
    for file in archiver.archive(before):
        show(file)
