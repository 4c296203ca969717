"""What the service's log tells: one line for each change of state, none for each span.

Each event is declared here once, with a name that stays, a level and a text; ``docs/logging.md``
is made from this table (:mod:`betrace.service.cli.docs.events`), and
:mod:`betrace.service.telemetry.logs` writes the lines. An event is called with its fields::

    STAGE_STALLED(stage="projection", seconds=30)

What is not a change of state, such as an error that an operator should see beside one, is logged
with the standard library's loggers and comes out in the same form, without a name.
"""

from __future__ import annotations

import logging
import string
from dataclasses import dataclass, field
from typing import Final

LOGGER: Final = "service.events"

_log = logging.getLogger(LOGGER)


@dataclass(frozen=True, slots=True)
class Told:
    """What a log record of an event carries beside its text, as its attribute ``told``."""

    name: str
    fields: dict[str, object]


@dataclass(frozen=True)
class Event:
    """A kind of line of the log. ``text`` is a format of its fields; ``more`` are fields that it
    does not show."""

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
        """Log it. Raises :exc:`TypeError` for other fields than the declared ones."""
        if fields.keys() != set(self.fields):
            raise TypeError(f"{self.name} has the fields {self.fields}, not {tuple(fields)}")
        if _log.isEnabledFor(self.level):
            told = Told(self.name, fields)
            _log.log(self.level, "%s", self.text.format(**fields), extra={"told": told})


DECLARED: list[Event] = []


def _event(name: str, level: int, text: str, meaning: str, *more: str) -> Event:
    event = Event(name, level, text, meaning, more)
    DECLARED.append(event)
    return event


STARTING = _event(
    "service.starting",
    logging.INFO,
    "starting version {version} on {data}",
    "The stores are open; kernels are loaded and the log is replayed next.",
    "pid",
)
REPLAYED = _event(
    "service.replayed",
    logging.INFO,
    "replayed {requests} requests with {spans} spans from the log; {damaged} could not be read",
    "What came since the last checkpoint has been read back.",
)
READY = _event(
    "service.ready",
    logging.INFO,
    "ready after {seconds:.1f} s: spans at {ingest} and {grpc} (gRPC), API at {api}, "
    "metrics at {metrics}",
    "Requests are accepted. An address is None where a listener is off.",
)
DRAINING = _event(
    "service.draining",
    logging.INFO,
    "stopping: no more requests, then draining",
    "It was told to stop; what was accepted is finished first.",
)
STOPPED = _event(
    "service.stopped",
    logging.INFO,
    "stopped after {seconds:.0f} s of service, {left} spans not finished",
    "The end. What was not finished within `shutdown.grace_seconds` is replayed at the next start.",
)
REFUSING = _event(
    "ingestion.refusing",
    logging.WARNING,
    "requests are refused: {reason}",
    "The first request in a while is refused for a reason that is the service's or a quota's "
    "(those of `betrace_requests_refused_total`: overloaded, memory, unavailable, quota).",
)
ACCEPTING = _event(
    "ingestion.accepting",
    logging.INFO,
    "no requests are refused any more: {reason}, {requests} requests with about {spans} spans in "
    "{seconds:.0f} s",
    "For five seconds none was refused for that reason.",
)
CLIENT_ERROR = _event(
    "ingestion.client_error",
    logging.WARNING,
    "rejected a request from {peer}: {message}{again}",
    "A client got 400, 401, 403, 404, 405, 415 or 505, or the same over gRPC; the message says "
    "what to change. Logged once a minute for each kind and peer.",
    "kind",
)
STAGE_STALLED = _event(
    "stage.stalled",
    logging.ERROR,
    "the stage {stage} has {size} {unit} to do and has finished nothing for {seconds:g} s",
    "It has made no progress for `pipeline.stall_seconds`. See BetraceStageStalled in the runbook.",
)
STAGE_RECOVERED = _event(
    "stage.recovered",
    logging.INFO,
    "the stage {stage} makes progress again",
    "A stage that was stalled is not any more.",
)
BREAKER_OPENED = _event(
    "breaker.opened",
    logging.WARNING,
    "the breaker {breaker} is {after} (it was {before}): {reason}",
    "What it protects is not called, but for trials; `after` is open or forced_open.",
)
BREAKER_CHANGED = _event(
    "breaker.changed",
    logging.INFO,
    "the breaker {breaker} is {after} (it was {before}): {reason}",
    "It tries (half_open), is closed again, or was disabled.",
)
RULES_CHANGED = _event(
    "rules.changed",
    logging.INFO,
    "rules changed: {tenants}",
    "Rules of these tenants were read anew and are in force.",
)
RULES_BROKEN = _event(
    "rules.broken",
    logging.WARNING,
    "rule file not taken, its last good version stays: {problem}",
    "Once for each file and problem.",
)
RULES_MENDED = _event(
    "rules.mended",
    logging.INFO,
    "the rule file {file} is taken again",
    "A file that was not taken is right again, or is gone.",
)
CHECKPOINT_FAILED = _event(
    "checkpoint.failed",
    logging.ERROR,
    "the checkpoint cannot be written ({error}); check the disk",
    "The first of a row of failures. A restart would read more of the log.",
)
CHECKPOINT_WORKS = _event(
    "checkpoint.recovered",
    logging.INFO,
    "checkpoints are written again, after {failures} failures",
    "The first success after failures.",
)
SYNC_FAILED = _event(
    "log.sync_failed",
    logging.ERROR,
    "the disk fails: {error}",
    "The first of a row of failures. See BetraceLogSyncFailing in the runbook.",
)
SYNC_WORKS = _event(
    "log.sync_recovered",
    logging.INFO,
    "the span log is synced again, after {failures} failures",
    "The first success after failures.",
)
FALLBACK_USED = _event(
    "fallback.used",
    logging.WARNING,
    "{store} does not answer: writing to fallback files",
    "What a store does not take goes to local files from now on, in order.",
)
FALLBACK_FAILED = _event(
    "fallback.failed",
    logging.ERROR,
    "{store}: the fallback files cannot be written: {error}",
    "The first of a row of failures: the files are full or the disk fails. The stage waits.",
)
FALLBACK_EMPTY = _event(
    "fallback.written_back",
    logging.INFO,
    "{store}: all that was in fallback files is written back",
    "The store has everything again.",
)
ARCHIVED = _event(
    "archive.done",
    logging.INFO,
    "archived {spans} spans in {files} files of {directory}; {released} bytes of the log deleted",
    "The daily task of archive and retention is done.",
)
ARCHIVE_FAILED = _event(
    "archive.failed",
    logging.ERROR,
    "{failures} things could not be archived or deleted, the first: {first}",
    "The daily task is tried again after an hour; what could not be archived stays in the log.",
)
EXPORT_FAILING = _event(
    "export.failing",
    logging.WARNING,
    "signals cannot be sent to {destination}: {error}",
    "The first of a row of failures. Signals wait in the ledger, and are sent when it works.",
)
EXPORT_WORKS = _event(
    "export.recovered",
    logging.INFO,
    "{destination} takes signals again, after {failures} failures",
    "The first success after failures.",
)
DEAD_LETTERS = _event(
    "dead_letters.kept",
    logging.ERROR,
    "{items} dead letters of {stage} after {attempts} attempts{again}: {error}",
    "A stage failed on items for good; `again` says whether they are tried again by themselves.",
)
OPERATOR = _event(
    "operator.acted",
    logging.INFO,
    "{who} ({client}) does {action} {target}",
    "An action of `/api/admin`, also in the audit log.",
)
DUCKDB_INCOMPLETE = _event(
    "duckdb.incomplete",
    logging.ERROR,
    "DuckDB of {tenant} is incomplete until the next start: {error}",
    "Queries miss some of what the ledger and the span log have.",
)
DUCKDB_REBUILT = _event(
    "duckdb.rebuilt",
    logging.INFO,
    "DuckDB of {tenant} has {signals} signals and {traces} traces again",
    "A file that was lost or damaged was made again.",
)
