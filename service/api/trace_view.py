"""One trace, reassembled: its spans from the log, its signals, and the verdicts of its rules.

Memory and index hold only numbers about a trace. Its spans are in the span log, in the request
bodies that they arrived in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from betrace.service.api.rendering import signals_json, trace_row_json
from betrace.service.api.trace_cache import MAX_SIGNALS, TraceMetadataCache
from betrace.service.config.base import MIB
from betrace.service.config.settings import Settings
from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.encoding import BodyTooLarge
from betrace.service.otlp.render import trace_as_json
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import Rule
from betrace.service.storage.duck.queries import SignalFilter, StoredSignal, TraceRow
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.errors import FrameCorrupt, FrameMissing
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.triage import TriageStore
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    ERRORS,
    FIRST_SEEN,
    FLAGS,
    LAST_SEEN,
    MAX_END,
    MIN_START,
    PARTIAL,
    POSITION_0,
    POSITION_COUNT,
    ROOT_SERVICE,
    SPANS,
)
from betrace.service.traces.trial import TRIAL_SECONDS, Trial, TrialError, Verdict

if TYPE_CHECKING:
    from betrace.service.cluster.query.open_traces import RemoteOpenTraces

Json = dict[str, Any]

# Limits of what is read and shown of one trace.
MAX_FRAMES = 4096
MAX_BYTES = 128 * MIB
MAX_SPANS = 20_000

_SPARE_RULES = 16
_FRAMES_AT_ONCE = 8  # of which a cluster fetches several in the time of one
_TOO_EXPENSIVE = (
    f"the verdicts were not computed within {TRIAL_SECONDS:g} s of processor time; "
    "use fewer or cheaper patterns"
)


class TraceReader:
    """Reads traces, open ones included. May be called from several threads at once.

    ``rules`` returns a tenant's rules.
    """

    def __init__(
        self,
        store: DuckStore,
        metadata: TraceMetadataCache,
        log: PartitionLog,
        rules: Callable[[str], tuple[Rule, ...]],
        open_traces: OpenTraces | RemoteOpenTraces,
        triage: TriageStore,
        settings: Settings,
    ) -> None:
        self._store = store
        self._metadata = metadata
        self._log = log
        self._rules = rules
        self._lock = threading.Lock()
        self._one_large = threading.Lock()  # reading a large trace takes hundreds of bytes a span
        self._spare: LRUCache[str, tuple[tuple[Rule, ...], CompiledRules]] = LRUCache(_SPARE_RULES)
        self._open_traces = open_traces
        self._triage = triage
        self._max_body = settings.ingest.max_body_bytes
        self._api = settings.api

    def trace(self, tenant: str, trace_id: str) -> Json | None:
        """The trace (32 lower-case hex digits); None if the tenant has no such trace.

        Beside the fields of a row of the index: ``state`` is ``open`` or ``closed``;
        ``resourceSpans`` are the spans as OTLP JSON; ``missing`` is the number of frames that
        could not be read (damaged, or past retention), ``omitted`` the number of frames and
        ``omittedSpans`` the number of spans left out of ``resourceSpans`` because of its length, of
        the frames that were read; ``missing_parents`` is the number of parents that spans name and
        that never came, None if not all spans could be read; ``signals`` are its signals, newest
        first;
        ``verdicts`` are those of the tenant's current rules, see :func:`_verdicts`.
        """
        # Memory first: a trace is in the index before it leaves memory.
        in_memory = self._open_traces.look_up(tenant, trace_id)
        is_open = in_memory is not None and not in_memory.closed
        row, stored = self._stored(tenant, trace_id, is_open)
        positions = set(row.positions if row else ())
        if in_memory is not None:
            current = _row(in_memory)
            positions.update(current.positions)
            if row is None:
                positions.update(self._store.spilled(tenant, trace_id))
            if row is None or is_open:
                row = current
        if row is None:
            return None

        frames = _Frames(self._log, tenant, sorted(positions), self._max_body)
        with self._compiled(tenant) as rules:
            trial = Trial(rules, trace_id, TRIAL_SECONDS)
            with self._one_large if row.spans > MAX_SPANS else nullcontext():
                shown = trace_as_json(frames.fold(trial), bytes.fromhex(trace_id), MAX_SPANS)
            # Spans can be missing when no frame is, because positions reach the index later.
            whole = not frames.missing and not frames.unread and trial.spans >= row.spans
            certain = whole and not is_open
            try:
                found = {verdict.rule_id: verdict for verdict in trial.verdicts(complete=certain)}
            except TrialError:  # none of its spans are left in the log, or too_expensive
                found, certain = {}, False
        return {
            **trace_row_json(row),
            "state": "open" if is_open else "closed",
            **shown,
            "missing": frames.missing,
            "omitted": frames.omitted,
            "omittedSpans": max(0, trial.spans - MAX_SPANS),
            "missing_parents": trial.missing_parents if whole else None,
            "signals": signals_json(self._triage, tenant, stored, self._api),
            "verdicts": _verdicts(
                rules,
                found,
                {
                    (s.signal.rule_id, s.signal.rule_version): s
                    for s in stored
                    if s.status == "active"
                },
                "kept" if certain else "open" if is_open else "unknown",
                _TOO_EXPENSIVE if trial.too_expensive else None,
            ),
        }

    def _stored(
        self, tenant: str, trace_id: str, is_open: bool
    ) -> tuple[TraceRow | None, Sequence[StoredSignal]]:
        """The trace's row and signals: from the cache, unless the trace is open and changing."""
        if not is_open and (found := self._metadata.find(tenant, trace_id)) is not None:
            return found.row, found.signals
        row = None
        if is_open:
            self._metadata.expect(tenant, trace_id)
            row = self._store.trace(tenant, trace_id)
        of_trace = SignalFilter(trace_id=trace_id)
        return row, self._store.signals(tenant, of_trace, limit=MAX_SIGNALS)[0]

    @contextmanager
    def _compiled(self, tenant: str) -> Iterator[CompiledRules]:
        """The tenant's current rules, compiled for one thread: folding adds span names to them, so
        they cannot be shared with the pipeline or another query."""
        rules = self._rules(tenant)
        with self._lock:
            of, compiled = self._spare.pop(tenant, ((), None))
        if compiled is None or of != rules:
            compiled = compile_rules(rules)
        yield compiled
        with self._lock:
            self._spare[tenant] = rules, compiled


def _verdicts(
    rules: CompiledRules,
    found: dict[str, Verdict],
    active: dict[tuple[str, str], StoredSignal],
    otherwise: str,
    not_computed: str | None,
) -> Json:
    """By rule id ``verdict``, ``clause``, ``signal`` (its id), ``counts`` and ``evidence``.

    The spans are evaluated again, so these are the verdicts of the current rules, even if the
    trace is older than a rule; signals record what the rules of the time found. ``breach`` is
    certain: the readable spans show it, or an active signal of the same version of the rule does.
    Without a breach the verdict is ``otherwise``: ``kept``; ``open`` while later spans may still
    break the rule; ``unknown`` if spans of a closed trace could not be read, or if a rule could not
    be judged (``undecided`` says why; ``not_computed`` does for all rules). ``groups`` are the
    broken ones of a rule with ``for each``; ``skipped`` says why a rule did not judge the trace.
    """
    verdicts = {}
    for rule in rules.rules:
        stored = active.get((rule.id, rule.version))
        signal = stored.signal if stored else None
        verdict = found.get(rule.id)
        shown: Json = {
            "verdict": otherwise,
            "clause": None,
            "signal": signal.id if signal else None,
            "counts": verdict.counts if verdict else {},
            "evidence": verdict.evidence if verdict else {},
        }
        if not_computed is not None and signal is None:
            shown |= {"verdict": "unknown", "undecided": not_computed}
        if verdict is not None and verdict.undecided is not None:
            shown |= {"verdict": "unknown", "undecided": verdict.undecided}
        if verdict is not None and verdict.skipped is not None:
            shown["skipped"] = verdict.skipped
        if verdict is not None and verdict.groups is not None:
            shown["groups"] = verdict.groups
        if verdict is not None and verdict.breach:
            shown |= {"verdict": "breach", "clause": verdict.clause}
        elif signal is not None and otherwise != "kept":
            shown |= {
                "verdict": "breach",
                "clause": signal.clause,
                "counts": signal.counts,
                "evidence": signal.evidence,
            }
        verdicts[rule.id] = shown
    return verdicts


def _row(trace: DueTraces) -> TraceRow:
    """A trace in memory as a row of the index."""
    values = trace.rows[0].tolist()
    service = values[ROOT_SERVICE]
    return TraceRow(
        trace_id=trace.trace_id(0),
        start_ns=values[MIN_START],
        end_ns=values[MAX_END],
        first_seen_ns=values[FIRST_SEEN],
        last_seen_ns=values[LAST_SEEN],
        spans=values[SPANS],
        errors=values[ERRORS],
        root_name=trace.root_name(0),
        root_service=trace.services[service] if service else None,
        services=trace.service_names(0),
        partial=bool(values[FLAGS] & PARTIAL),
        rules_version=trace.rules.version,
        positions=values[POSITION_0 : POSITION_0 + values[POSITION_COUNT]],
    )


class _Frames:
    """The frames of a trace, read a few at a time."""

    def __init__(self, log: PartitionLog, tenant: str, positions: list[int], max_body: int) -> None:
        self._log = log
        self._tenant = tenant
        self._positions = positions
        self._max_body = max_body
        self.missing = self.omitted = self.unread = 0

    def fold(self, trial: Trial) -> Iterator[bytes]:
        """Add the frames to a trial, and yield those to show as protobuf."""
        left = MAX_BYTES
        found: dict[int, Frame | FrameMissing | FrameCorrupt] = {}
        for number, position in enumerate(self._positions):
            if number == MAX_FRAMES or left <= 0:
                self.unread = len(self._positions) - number
                self.omitted += self.unread
                return
            if number % _FRAMES_AT_ONCE == 0:
                some = self._positions[number : number + _FRAMES_AT_ONCE]
                found = dict(zip(some, self._log.read_many(self._tenant, some), strict=True))
            body = self._body(found.pop(position))
            shown = trial.spans < MAX_SPANS
            try:
                added = trial.add(body) if body is not None else 0
            except TrialError:
                body = None
            if body is None:
                self.missing += 1
                continue
            left -= len(body)
            if shown:
                yield body
            elif added:
                self.omitted += 1

    def _body(self, frame: Frame | FrameMissing | FrameCorrupt) -> bytes | None:
        if not isinstance(frame, Frame):
            return None
        try:
            payload = bytes(frame.payload)
            return protobuf_body(payload, frame.content_type, frame.encoding, self._max_body)
        except (BadBody, BodyTooLarge):
            return None
