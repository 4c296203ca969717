"""Metrics of what is kept: the span log, checkpoints, dead letters, local files, DuckDB."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING

from betrace.service.api.metrics.declared import Declared, Samples, one
from betrace.service.config.stages import EXPORTS
from betrace.service.export.exporter import Exporter

if TYPE_CHECKING:
    from betrace.service.app import Service


def _checkpoint_time(service: Service) -> Samples:
    return one(service.recovery.saved_at or 0.0)


def _checkpoint_bytes(service: Service) -> Samples:
    return one(service.recovery.saved_bytes)


def _checkpoint_failures(service: Service) -> Samples:
    return one(service.recovery.failures)


def _disk(service: Service) -> Samples:
    try:
        usage = shutil.disk_usage(service.settings.storage.path)
    except OSError:  # the rest of the scrape is wanted then more than ever
        return
    yield ("free",), usage.free
    yield ("used",), usage.used


def _dead_letters(service: Service) -> Samples:
    held = service.pipeline.letters.held
    for name in service.pipeline.stages:
        if name != "span-ingestion":  # what it fails on is refused
            yield (name,), held[name].letters if name in held else 0


def _export(value: Callable[[Exporter], float]) -> Callable[[Service], Samples]:
    """A number of each destination, 0 for those that are off."""

    def samples(service: Service) -> Samples:
        on = {exporter.name: value(exporter) for exporter in service.exports}
        for name in EXPORTS:
            yield (name,), on.get(name, 0)

    return samples


def _exported(service: Service) -> Samples:
    for outcome in ("sent", "rejected"):
        for (name,), number in _export(attrgetter(outcome))(service):
            yield (name, outcome), number


def _audit_dropped(service: Service) -> Samples:
    audit = service.pipeline.batch_audit
    return one(audit.dropped() if audit is not None else 0)


DECLARED = (
    Declared(
        "betrace_export_signals",
        "counter",
        "Signals sent to another system: sent, or rejected for good.",
        ("destination", "outcome"),
        _exported,
    ),
    Declared(
        "betrace_export_failures",
        "counter",
        "Deliveries to another system that failed and are tried again.",
        ("destination",),
        _export(attrgetter("failures")),
    ),
    Declared(
        "betrace_export_lag_seconds",
        "gauge",
        "How old the oldest signal is that another system has not taken; 0 when none waits.",
        ("destination",),
        _export(Exporter.lag_seconds),
    ),
    Declared(
        "betrace_audit_batches_dropped",
        "counter",
        "Accepted requests that audit.batches could not note, since the disk was slow.",
        (),
        _audit_dropped,
    ),
    Declared(
        "betrace_ledger_clients_replaced",
        "counter",
        "Clients of the ledger that were given up and replaced, for a call that hung or a session "
        "that ended.",
        (),
        lambda s: one(s.ledger.clients.replaced),
    ),
    Declared(
        "betrace_ledger_clients_left_behind",
        "gauge",
        "Clients of the ledger that were given up and whose call has not come back.",
        (),
        lambda s: one(s.ledger.clients.left_behind),
    ),
    Declared(
        "betrace_span_log_bytes",
        "counter",
        "Bytes written to the span log.",
        (),
        lambda s: one(s.log.statistics().bytes),
    ),
    Declared(
        "betrace_span_log_unsynced_bytes",
        "gauge",
        "Bytes of the span log that would be lost if the machine died now.",
        (),
        lambda s: one(s.log.statistics().unsynced_bytes),
    ),
    Declared(
        "betrace_span_log_sync_seconds",
        "gauge",
        "How long the last sync of the span log took.",
        (),
        lambda s: one(s.pipeline.sync.last_seconds),
    ),
    Declared(
        "betrace_span_log_sync_failures",
        "counter",
        "Syncs of the span log that the disk failed.",
        (),
        lambda s: one(s.pipeline.sync.failures),
    ),
    Declared(
        "betrace_checkpoint_timestamp_seconds",
        "gauge",
        "When the last checkpoint was complete; 0 before the first.",
        (),
        _checkpoint_time,
    ),
    Declared(
        "betrace_checkpoint_bytes",
        "gauge",
        "Size of the last checkpoint that was written.",
        (),
        _checkpoint_bytes,
    ),
    Declared(
        "betrace_checkpoint_failures",
        "counter",
        "Checkpoints that could not be written.",
        (),
        _checkpoint_failures,
    ),
    Declared(
        "betrace_archive_spans",
        "counter",
        "Spans written to the archive by the daily task.",
        (),
        lambda s: one(s.daily.spans),
    ),
    Declared(
        "betrace_span_log_released_bytes",
        "counter",
        "Bytes of the span log deleted since they were past retention.",
        (),
        lambda s: one(s.daily.released_bytes),
    ),
    Declared(
        "betrace_archive_failures",
        "counter",
        "Runs of the daily task of archive and retention that could not do everything.",
        (),
        lambda s: one(s.daily.failures),
    ),
    Declared(
        "betrace_archive_timestamp_seconds",
        "gauge",
        "When the daily task of archive and retention last did everything; 0 before.",
        (),
        lambda s: one(s.daily.succeeded_at or 0.0),
    ),
    Declared(
        "betrace_data_disk_bytes",
        "gauge",
        "The file system of the data directory: what BeTrace may still write, and what is used.",
        ("state",),
        _disk,
        blocks=True,
    ),
    Declared(
        "betrace_dead_letters",
        "gauge",
        "Dead letters, by the stage that failed.",
        ("stage",),
        _dead_letters,
    ),
    Declared(
        "betrace_dead_letters_exported",
        "counter",
        "Dead letters moved to files, since they no longer fitted.",
        (),
        lambda s: one(s.pipeline.letters.exported),
    ),
    Declared(
        "betrace_fallback_pending",
        "gauge",
        "Records in local files that wait for their store.",
        ("store",),
        lambda s: [((n,), f.statistics().lines) for n, f in s.pipeline.fallbacks.items()],
    ),
    Declared(
        "betrace_duckdb_rows",
        "counter",
        "Rows written to DuckDB.",
        (),
        lambda s: one(s.pipeline.project.rows),
    ),
    Declared(
        "betrace_start_time_seconds",
        "gauge",
        "When the service started.",
        (),
        lambda s: one(s.started_at),
    ),
)
