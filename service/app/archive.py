"""Builds the daily task of a query node: archive and retention on a cluster."""

from __future__ import annotations

import trio

from betrace.service.cluster.query.node import ClusterConnection
from betrace.service.config.settings import Settings
from betrace.service.export.archiver import Throttle, archive_directory
from betrace.service.export.cluster_archiver import ClusterArchiver
from betrace.service.export.daily import ArchiveKeeping, Daily
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.jetstream.archive_progress import read_progress

DUTY = "archive"
"""The duty of the one node that archives."""
WORK = "archive.new"
"""The folder in the data directory with the day that is being archived. Backups leave out names
that end like this."""


def cluster_daily(settings: Settings, store: DuckStore, cluster: ClusterConnection) -> Daily:
    """The daily task of a query node."""

    def make_archiver() -> ClusterArchiver:
        return ClusterArchiver(
            cluster.spans,
            lambda: cluster.partitions.generations.total,
            cluster.config,
            archive_directory(settings),
            settings.storage.path / WORK,
            settings.ingest.max_body_bytes,
            Throttle(),
        )

    def archived_ns() -> int:
        progress = trio.run(read_progress, cluster.config)
        return 0 if progress is None else progress.until_ns

    duty = cluster.duties.get(DUTY) if settings.archive.enabled else None
    return Daily(settings, store, make_archiver, ArchiveKeeping(duty, archived_ns))
