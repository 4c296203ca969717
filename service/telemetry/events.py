"""The events of the service's log: one line per change of state, none per span.

Each event is declared once, here, with a stable name, a level and a text. ``docs/logging.md`` is
generated from these declarations (:mod:`betrace.service.cli.docs.events`), and
:mod:`betrace.service.telemetry.logs` writes the lines. To log an event, call it with its fields::

    STAGE_STALLED(stage="projection", size=3, unit="rows", seconds=30.0)

Other messages, such as the details of an error, use the standard library's loggers and appear in
the same format, without an event name.
"""

from __future__ import annotations

import logging
import string
from dataclasses import dataclass, field
from typing import Final

LOGGER: Final = "service.events"

_log = logging.getLogger(LOGGER)


@dataclass(frozen=True, slots=True)
class EventFields:
    """The name and fields of an event, attached to its log record as the attribute ``event``."""

    name: str
    fields: dict[str, object]


@dataclass(frozen=True)
class Event:
    """A kind of log line. ``text`` is a format string with its fields; ``more`` are fields that the
    text does not show."""

    name: str
    level: int
    text: str
    meaning: str
    more: tuple[str, ...] = ()
    fields: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        shown = [name for _, name, _, _ in string.Formatter().parse(self.text) if name]
        object.__setattr__(self, "fields", (*dict.fromkeys(shown), *self.more))

    def __call__(self, **fields: object) -> None:
        """Log it. Raises :exc:`TypeError` if the fields are not the declared ones."""
        if fields.keys() != set(self.fields):
            raise TypeError(f"{self.name} has the fields {self.fields}, not {tuple(fields)}")
        if _log.isEnabledFor(self.level):
            extra = {"event": EventFields(self.name, fields)}
            _log.log(self.level, "%s", self.text.format(**fields), extra=extra)


DECLARED: list[Event] = []


def _event(name: str, level: int, text: str, meaning: str, *more: str) -> Event:
    event = Event(name, level, text, meaning, more)
    DECLARED.append(event)
    return event


STARTING = _event(
    "service.starting",
    logging.INFO,
    "starting version {version} on {data}",
    "The stores are open. Next, kernels are loaded and the log is replayed.",
    "pid",
)
REPLAYED = _event(
    "service.replayed",
    logging.INFO,
    "replayed {requests} requests with {spans} spans from the log; {damaged} could not be read",
    "Everything since the last checkpoint has been read again.",
)
READY = _event(
    "service.ready",
    logging.INFO,
    "ready after {seconds:.1f} s. OTLP over HTTP: {ingest}. OTLP over gRPC: {grpc}. API: {api}. "
    "Metrics: {metrics}",
    "Requests are accepted. The address of a listener that is off is None.",
)
DRAINING = _event(
    "service.draining",
    logging.INFO,
    "stopping: refusing new requests, then draining",
    "The service received a signal to stop. It finishes what it has accepted first.",
)
STOPPED = _event(
    "service.stopped",
    logging.INFO,
    "stopped after {seconds:.0f} s of service; {left} spans are left for the next start",
    "Spans not finished within `shutdown.grace_seconds` are replayed at the next start.",
)
REFUSING = _event(
    "ingestion.refusing",
    logging.WARNING,
    "refusing requests: {reason}",
    "First request in a while that is refused because of the service or a quota (`reason` as in "
    "`betrace_requests_refused_total`: overloaded, memory, unavailable, quota).",
)
ACCEPTING = _event(
    "ingestion.accepting",
    logging.INFO,
    "no longer refusing requests ({reason}): refused {requests} requests with about {spans} spans "
    "in {seconds:.0f} s",
    "No request was refused for this reason for five seconds.",
)
CLIENT_ERROR = _event(
    "ingestion.client_error",
    logging.WARNING,
    "rejected a request from {peer}: {message}{again}",
    "A client got 400, 401, 403, 404, 405, 415 or 505, or the same over gRPC; the message says "
    "what to change. Logged once a minute for each kind and peer.",
    "kind",
)
DATA_GONE = _event(
    "data.gone",
    logging.CRITICAL,
    "the data directory {path} was deleted or replaced; spans are refused",
    "What is written now would be lost. Put the directory back, or stop the service and start it "
    "with an empty one.",
)
DATA_BACK = _event(
    "data.back",
    logging.WARNING,
    "the data directory {path} is back; spans are accepted",
    "The directory that was moved away is back.",
)
LOG_DAMAGED = _event(
    "log.damaged",
    logging.ERROR,
    "the span log of {tenant} is damaged: {bytes} bytes at offset {offset} of segment {segment} "
    "cannot be read ({reason}); lost: {lost}",
    "Logged once for each place, when it is read. Spans that a checkpoint contained were "
    "evaluated, but they cannot be shown or archived. See BetraceSpanLogDamaged in the runbook.",
)
SCRUBBED = _event(
    "scrub.completed",
    logging.INFO,
    "everything stored was read; damaged places of the span log known since the start: {places}",
    "Once a day, at `log.scrub_bytes_per_second`. Each damaged place is logged when it is read.",
)
LOG_CUT = _event(
    "log.cut",
    logging.INFO,
    "cut {bytes} bytes off the span log of {tenant}: the last write was interrupted",
    "A crash interrupted a write. Its request was not answered, so nothing is lost.",
)
STAGE_STALLED = _event(
    "stage.stalled",
    logging.ERROR,
    "the stage {stage} has {size} {unit} waiting and has finished none for {seconds:g} s",
    "No progress for `pipeline.stall_seconds`. See BetraceStageStalled in the runbook.",
)
STAGE_RECOVERED = _event(
    "stage.recovered",
    logging.INFO,
    "the stage {stage} makes progress again",
    "The stage is no longer stalled.",
)
BREAKER_OPENED = _event(
    "breaker.opened",
    logging.WARNING,
    "the breaker {breaker} is {after} (it was {before}): {reason}",
    "What it protects is not called, except for trial calls; `after` is open or forced_open.",
)
BREAKER_CHANGED = _event(
    "breaker.changed",
    logging.INFO,
    "the breaker {breaker} is {after} (it was {before}): {reason}",
    "The breaker is trying calls (half_open), is closed again, or was disabled.",
)
RULES_CHANGED = _event(
    "rules.changed",
    logging.INFO,
    "rules changed: {tenants}",
    "Changed rules of these tenants were read and are in force.",
)
RULES_BROKEN = _event(
    "rules.broken",
    logging.WARNING,
    "rule file rejected; the last valid version stays in force: {problem}",
    "Logged once per file and problem, and at every start. Without a valid version, such as at the "
    "start, the file has no effect.",
)
RULES_MENDED = _event(
    "rules.mended",
    logging.INFO,
    "the rule file {file} is valid again",
    "A rejected file is valid again, or was removed.",
)
RULES_UNDECIDED = _event(
    "rules.undecided",
    logging.WARNING,
    "{count} traces could not be judged by a rule; for example {trace} of "
    "{tenant} by {rule}: {reason}",
    "Logged at most once a minute. The traces were neither found to break the rules nor to keep "
    "them. See BetraceRulesUndecided in the runbook.",
)
CHECKPOINT_FAILED = _event(
    "checkpoint.failed",
    logging.ERROR,
    "cannot write the checkpoint ({error}); check the disk",
    "First of several consecutive failures. A restart would read more of the log.",
)
CHECKPOINT_WORKS = _event(
    "checkpoint.recovered",
    logging.INFO,
    "checkpoints are written again after {failures} failures",
    "First success after failures.",
)
SYNC_FAILED = _event(
    "log.sync_failed",
    logging.ERROR,
    "cannot sync the span log: {error}",
    "First of several consecutive failures. See BetraceLogSyncFailing in the runbook.",
)
SYNC_WORKS = _event(
    "log.sync_recovered",
    logging.INFO,
    "the span log is synced again after {failures} failures",
    "First success after failures.",
)
FALLBACK_USED = _event(
    "fallback.used",
    logging.WARNING,
    "{store} does not answer; writing to fallback files",
    "From now on, writes to this store go to local files, in order.",
)
FALLBACK_FAILED = _event(
    "fallback.failed",
    logging.ERROR,
    "cannot write the fallback files of {store}: {error}",
    "First of several consecutive failures: the files are full or the disk fails. The stage waits.",
)
FALLBACK_EMPTY = _event(
    "fallback.written_back",
    logging.INFO,
    "{store}: everything in fallback files is written back",
    "The store is complete again.",
)
ARCHIVED = _event(
    "archive.done",
    logging.INFO,
    "archived {spans} spans in {files} files of {directory}; {released} bytes of the log deleted",
    "The daily archive and retention task is done.",
)
ARCHIVE_FAILED = _event(
    "archive.failed",
    logging.ERROR,
    "could not archive or delete {failures} items; the first: {first}",
    "The daily task is retried after an hour. What is not archived stays in the log.",
)
EXPORT_FAILING = _event(
    "export.failing",
    logging.WARNING,
    "cannot send signals to {destination}: {error}",
    "First of several consecutive failures. Signals wait in the ledger until sending works.",
)
EXPORT_WORKS = _event(
    "export.recovered",
    logging.INFO,
    "{destination} accepts signals again after {failures} failures",
    "First success after failures.",
)
ALERT_FIRING = _event(
    "alert.firing",
    logging.INFO,
    "the rule {rule} of tenant {tenant} is broken",
    "An alert begins, or continues before receivers were told that it was over. Not logged for "
    "signals that page nobody, nor without a destination in [alerts].",
)
ALERT_RESOLVED = _event(
    "alert.resolved",
    logging.INFO,
    "the rule {rule} of tenant {tenant} is no longer broken ({reason}); {count} traces broke it",
    "An alert ended: quiet (no new signal for alerts.resolve_after_seconds), retracted (all of its "
    "signals were), or muted.",
)
ALERTS_FULL = _event(
    "alerts.full",
    logging.ERROR,
    "more than {most} rules are broken at once; the rule {rule} of tenant {tenant} pages nobody",
    "Logged for the first such rule. Raise alerts.max_active, or mute rules.",
)
ALERTS_FAILING = _event(
    "alerts.failing",
    logging.WARNING,
    "cannot send alerts to {destination}: {error}",
    "First of several consecutive failures. Alerts are kept until sending works.",
)
ALERTS_WORK = _event(
    "alerts.recovered",
    logging.INFO,
    "{destination} accepts alerts again after {failures} failures",
    "First success after failures.",
)
ALERT_REJECTED = _event(
    "alerts.rejected",
    logging.ERROR,
    "{destination} will never accept alerts such as that of the rule {rule} of tenant {tenant}: "
    "{error}",
    "The destination answered 400, 413, 415 or 422. It is not retried at once, but "
    "sent again when that is due anyway.",
)
DEAD_LETTERS = _event(
    "dead_letters.kept",
    logging.ERROR,
    "{items} dead letters of {stage} after {attempts} attempts{again}: {error}",
    "A stage gave up on items. `again` says whether they are retried automatically.",
)
OPERATOR = _event(
    "operator.acted",
    logging.INFO,
    "{who} ({client}): {action} {target}",
    "An action through `/api/admin`, also in the audit log.",
)
DUCKDB_DAMAGED = _event(
    "duckdb.damaged",
    logging.ERROR,
    "the DuckDB file of {tenant} is set aside and rebuilt: {error}",
    "Signals come from the ledger, the index of traces from the span log. Until that is done, "
    "queries miss some of both, and late spans of closed traces make partial traces.",
)
DUCKDB_INCOMPLETE = _event(
    "duckdb.incomplete",
    logging.ERROR,
    "DuckDB of {tenant} is incomplete until the next start: {error}",
    "Queries miss some of what the ledger and the span log contain.",
)
DUCKDB_REBUILT = _event(
    "duckdb.rebuilt",
    logging.INFO,
    "rebuilt DuckDB of {tenant}: {signals} signals and {traces} traces{missing}",
    "A lost or damaged file was rebuilt. `missing` says which traces could not be.",
)
NODE_JOINED = _event(
    "cluster.node_joined",
    logging.INFO,
    "the node {node} joined the cluster ({roles})",
    "A node's heartbeat appeared, or moves again.",
)
NODE_GONE = _event(
    "cluster.node_gone",
    logging.WARNING,
    "the node {node} is no longer in the cluster",
    "A node left, or its heartbeat has not moved for `cluster.lease_seconds`. Its partitions go to "
    "other evaluators.",
)
NODE_NAME_TAKEN = _event(
    "cluster.node_name_taken",
    logging.ERROR,
    "another process has the name of this node, {node}; set cluster.node to a different name",
    "Two running processes have the same name, so each takes the partitions of the other.",
)
RULES_RECEIVED = _event(
    "cluster.rules_received",
    logging.INFO,
    "rule files of tenant {tenant} were changed at another query node: {files}",
    "The files on this node's disk are now the same.",
)
RULES_CONFLICT = _event(
    "cluster.rules_conflict",
    logging.WARNING,
    "the rule file {file} of tenant {tenant} was changed here and at another query node",
    "The version that reached the cluster first counts. The one that was here is beside it, with "
    "`.conflict` added to its name, unless it was deleted.",
)
DUTY_TAKEN = _event(
    "cluster.duty_taken",
    logging.INFO,
    "this node now has the duty {duty}",
    "One query node at a time has a duty, such as sending signals to a destination. `alerts` is to "
    "follow the alerts and send them.",
)
DUTY_LOST = _event(
    "cluster.duty_lost",
    logging.WARNING,
    "this node no longer has the duty {duty}",
    "The lease could not be renewed, or another node took it. The other node continues the work.",
)
PARTITION_TAKEN_OVER = _event(
    "cluster.partition_taken_over",
    logging.INFO,
    "partition {partition} is current after {seconds:.1f} s: replayed {messages} messages",
    "This node owns the partition and has applied everything that was in its log.",
    "epoch",
)
PARTITION_HANDED_OVER = _event(
    "cluster.partition_handed_over",
    logging.INFO,
    "partition {partition} was handed over after message {applied}",
    "This node released the partition in an orderly way, because another should own it or because "
    "it stops.",
)
PARTITION_FINISHED = _event(
    "cluster.partition_finished",
    logging.INFO,
    "partition {partition} ends with message {sealed}: the partitions that continue it may begin",
    "The cluster is resized. Everything in the partition's log up to its seal is evaluated, and "
    "its open traces are passed on.",
    "bytes",
)
PARTITION_FENCED = _event(
    "cluster.partition_fenced",
    logging.WARNING,
    "partition {partition} was taken over by another evaluator, so this one drops it",
    "This node was too slow to renew its lease: it was frozen, cut off or overloaded. Nothing is "
    "lost or doubled.",
    "epoch",
)
LEASE_LOST = _event(
    "cluster.lease_lost",
    logging.WARNING,
    "another evaluator has the lease of partition {partition}; this one stops working on it",
    "As `cluster.partition_fenced`, but noticed earlier.",
)
PARTITION_FAILED = _event(
    "cluster.partition_failed",
    logging.ERROR,
    "partition {partition} was dropped because of an error and is taken over again in "
    "{seconds:.1f} s: {error}",
    "Nothing is lost, but the partition's signals wait.",
)
PARTITION_WAITS = _event(
    "cluster.partition_waits",
    logging.WARNING,
    "partition {partition} waits: {reason}",
    "A verdict needs earlier spans or signals that cannot be read now, for example because no "
    "query node answers; or the cluster is new and has no rules. The partition continues when they "
    "can be read, and when rules are published.",
)
CHECKPOINT_UNUSABLE = _event(
    "cluster.checkpoint_unusable",
    logging.WARNING,
    "the checkpoint {name} cannot be used, so an older one is loaded: {reason}",
    "The replay takes longer. If the log has lost messages, see `cluster.log_damaged`.",
)
PARTITION_LOG_DAMAGED = _event(
    "cluster.log_damaged",
    logging.ERROR,
    "messages of partition {partition} are missing: {what}",
    "The servers deleted or lost messages that they had acknowledged. Check `sync_interval`, the "
    "streams' limits, and the servers' disks.",
)
