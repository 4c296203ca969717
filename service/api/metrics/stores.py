"""Metrics of the stores: span log, ledger, checkpoints, dead letters, fallback files, archive,
DuckDB, exports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from operator import attrgetter

from betrace.service.api.metrics.declared import Declared, Samples, one
from betrace.service.api.sources import Sources
from betrace.service.config.stages import EXPORTS
from betrace.service.export.exporter import Exporter


def _checkpoint_time(sources: Sources) -> Samples:
    return one(sources.recovery.saved_at or 0.0)


def _checkpoint_bytes(sources: Sources) -> Samples:
    return one(sources.recovery.saved_bytes)


def _checkpoint_failures(sources: Sources) -> Samples:
    return one(sources.recovery.failures)


def _disk(sources: Sources) -> Samples:
    try:
        usage = shutil.disk_usage(sources.settings.storage.path)
    except OSError:  # the other metrics are needed now more than ever
        return
    yield ("free",), usage.free
    yield ("used",), usage.used


def _dead_letters(sources: Sources) -> Samples:
    held = sources.pipeline.letters.book.held
    for name in sources.pipeline.stages:
        if name != "span-ingestion":  # refuses what it fails on
            yield (name,), held[name].letters if name in held else 0


def _export(value: Callable[[Exporter], float]) -> Callable[[Sources], Samples]:
    """A number for each destination; 0 if it is not configured."""

    def samples(sources: Sources) -> Samples:
        on = {exporter.name: value(exporter) for exporter in sources.exports}
        for name in EXPORTS:
            yield (name,), on.get(name, 0)

    return samples


def _exported(sources: Sources) -> Samples:
    for outcome in ("sent", "rejected"):
        for (name,), number in _export(attrgetter(outcome))(sources):
            yield (name, outcome), number


def _audit_dropped(sources: Sources) -> Samples:
    audit = sources.pipeline.batch_audit
    return one(audit.dropped() if audit is not None else 0)


DECLARED: tuple[Declared[Sources], ...] = (
    Declared(
        "betrace_export_signals",
        "counter",
        "Signals exported, by outcome: sent, or permanently rejected.",
        ("destination", "outcome"),
        _exported,
    ),
    Declared(
        "betrace_export_failures",
        "counter",
        "Failed deliveries to another system that are retried.",
        ("destination",),
        _export(attrgetter("failures")),
    ),
    Declared(
        "betrace_export_lag_seconds",
        "gauge",
        "Age of the oldest signal that another system has not accepted; 0 if none is waiting.",
        ("destination",),
        _export(Exporter.lag_seconds),
    ),
    Declared(
        "betrace_audit_batches_dropped",
        "counter",
        "Accepted requests that audit.batches did not record because the disk was slow.",
        (),
        _audit_dropped,
    ),
    Declared(
        "betrace_ledger_clients_replaced",
        "counter",
        "Ledger clients replaced because a call hung or a session ended.",
        (),
        lambda s: one(s.ledger.clients.replaced),
    ),
    Declared(
        "betrace_ledger_clients_left_behind",
        "gauge",
        "Replaced ledger clients whose call is still hung.",
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
        "Bytes of the span log that a crash of the machine would lose now.",
        (),
        lambda s: one(s.log.statistics().unsynced_bytes),
    ),
    Declared(
        "betrace_span_log_sync_seconds",
        "gauge",
        "Duration of the last sync of the span log.",
        (),
        lambda s: one(s.pipeline.sync.last_seconds),
    ),
    Declared(
        "betrace_span_log_sync_failures",
        "counter",
        "Failed syncs of the span log.",
        (),
        lambda s: one(s.pipeline.sync.failures),
    ),
    Declared(
        "betrace_span_log_damaged_places",
        "counter",
        "Places of the span log found damaged, each counted once.",
        (),
        lambda s: one(s.log.damage.places),
    ),
    Declared(
        "betrace_span_log_damaged_bytes",
        "counter",
        "Bytes of the span log found damaged.",
        (),
        lambda s: one(s.log.damage.bytes),
    ),
    Declared(
        "betrace_span_log_damaged_spans",
        "counter",
        "Accepted spans known to be lost in damaged places of the span log; there may be more.",
        (),
        lambda s: one(s.log.damage.spans),
    ),
    Declared(
        "betrace_scrub_bytes",
        "counter",
        "Bytes of the span log and of DuckDB's files read to find damage.",
        (),
        lambda s: one(s.scrub.bytes),
    ),
    Declared(
        "betrace_scrub_timestamp_seconds",
        "gauge",
        "When everything stored had last been read to find damage; 0 before the first time.",
        (),
        lambda s: one(s.scrub.completed_at),
    ),
    Declared(
        "betrace_checkpoint_timestamp_seconds",
        "gauge",
        "When the last checkpoint was completed; 0 before the first.",
        (),
        _checkpoint_time,
    ),
    Declared(
        "betrace_checkpoint_bytes",
        "gauge",
        "Size of the last checkpoint.",
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
        "Bytes of the span log deleted because they were past retention.",
        (),
        lambda s: one(s.daily.released_bytes),
    ),
    Declared(
        "betrace_archive_failures",
        "counter",
        "Incomplete runs of the daily archive and retention task.",
        (),
        lambda s: one(s.daily.failures),
    ),
    Declared(
        "betrace_archive_timestamp_seconds",
        "gauge",
        "When the daily archive and retention task last completed; 0 before the first time.",
        (),
        lambda s: one(s.daily.succeeded_at or 0.0),
    ),
    Declared(
        "betrace_data_disk_bytes",
        "gauge",
        "Bytes of the file system of the data directory: free for BeTrace to write, and used.",
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
        "Dead letters moved to files because the store was full.",
        (),
        lambda s: one(s.pipeline.letters.exported),
    ),
    Declared(
        "betrace_fallback_pending",
        "gauge",
        "Records in local files that are waiting for their store.",
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
