"""One trace, put together again: its spans from the log, its signals, what its rules say of it.

Only numbers of a trace are kept in memory and in the index; its spans are in the span log, in the
request bodies that they came in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cachetools import LRUCache

from betrace.service.api.trace_cache import MAX_SIGNALS, TraceMetadataCache
from betrace.service.config.base import MIB
from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.encoding import BodyTooLarge
from betrace.service.otlp.render import trace_as_json
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.store import Rule
from betrace.service.storage.duck.store import DuckStore, StoredSignal, TraceRow
from betrace.service.storage.spanlog.log import Frame, FrameCorrupt, FrameMissing, SpanLog
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
from betrace.service.traces.trial import Trial, TrialError, Verdict

Json = dict[str, Any]

# What is read of one trace, and shown of it, at most.
MAX_FRAMES = 4096
MAX_BYTES = 128 * MIB
MAX_SPANS = 20_000

_SPARE_RULES = 16


class OpenTraces(Protocol):
    """Where the traces in memory are:
    :class:`betrace.service.pipeline.stages.correlate.CorrelateStage`."""

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of one trace that is in memory, None where there is none."""


def signal_json(stored: StoredSignal) -> Json:
    """A signal with its status."""
    return {**stored.signal.to_json(), "status": stored.status}


def trace_json(row: TraceRow) -> Json:
    """A row of the trace index."""
    return {
        "trace_id": row.trace_id,
        "start": row.start_ns,
        "end": row.end_ns,
        "duration_ns": row.end_ns - row.start_ns,
        "spans": row.spans,
        "errors": row.errors,
        "root_name": row.root_name,
        "root_service": row.root_service,
        "services": row.services,
        "partial": row.partial,
    }


class TraceReader:
    """Shows traces, open ones too. May be called from several threads at once.

    ``rules`` gives a tenant's rules; ``max_body_bytes`` bounds what a frame of the log is
    decompressed to.
    """

    def __init__(
        self,
        store: DuckStore,
        metadata: TraceMetadataCache,
        log: SpanLog,
        rules: Callable[[str], tuple[Rule, ...]],
        open_traces: OpenTraces,
        max_body_bytes: int,
    ) -> None:
        self._store = store
        self._metadata = metadata
        self._log = log
        self._rules = rules
        self._lock = threading.Lock()
        self._spare: LRUCache[str, tuple[tuple[Rule, ...], CompiledRules]] = LRUCache(_SPARE_RULES)
        self._open_traces = open_traces
        self._max_body = max_body_bytes

    def trace(self, tenant: str, trace_id: str) -> Json | None:
        """The trace (32 lower-case hex digits), None where the tenant has no such trace.

        Beside the fields of :func:`trace_json`: ``state`` is ``open`` or ``closed``;
        ``resourceSpans`` the spans as OTLP JSON; ``missing`` how many of its frames could not be
        read (damaged, or past retention) and ``omitted`` how many were left out of
        ``resourceSpans`` for its length; ``signals`` its signals, newest first; ``verdicts`` what
        the tenant's present rules say of it, see :func:`_verdicts`.
        """
        # First the memory, then the index, where a trace is by the time that it leaves the memory.
        held = self._open_traces.look_up(tenant, trace_id)
        is_open = held is not None and not held.closed
        row, stored = self._stored(tenant, trace_id, is_open)
        positions = set(row.positions if row else ())
        if held is not None:
            in_memory = _row(held)
            positions.update(in_memory.positions)
            if row is None:
                positions.update(self._store.spilled(tenant, trace_id))
            if row is None or is_open:
                row = in_memory
        if row is None:
            return None

        frames = _Frames(self._log, tenant, sorted(positions), self._max_body)
        with self._compiled(tenant) as rules:
            trial = Trial(rules, trace_id)
            shown = trace_as_json(frames.fold(trial), bytes.fromhex(trace_id))
            # A span may be missing although no frame is: positions are on their way to the index.
            whole = not frames.missing and not frames.unread and trial.spans >= row.spans
            certain = whole and not is_open
            try:
                found = {verdict.rule_id: verdict for verdict in trial.verdicts(complete=certain)}
            except TrialError:  # the log has none of its spans any more
                found, certain = {}, False
        return {
            **trace_json(row),
            "state": "open" if is_open else "closed",
            **shown,
            "missing": frames.missing,
            "omitted": frames.omitted,
            "signals": [signal_json(each) for each in stored],
            "verdicts": _verdicts(
                rules,
                found,
                {
                    (s.signal.rule_id, s.signal.rule_version): s
                    for s in stored
                    if s.status == "active"
                },
                "kept" if certain else "open" if is_open else "unknown",
            ),
        }

    def _stored(
        self, tenant: str, trace_id: str, is_open: bool
    ) -> tuple[TraceRow | None, Sequence[StoredSignal]]:
        """What the store has of a trace: from the cache, unless the trace is open and changes."""
        if not is_open and (found := self._metadata.find(tenant, trace_id)) is not None:
            return found.row, found.signals
        row = None
        if is_open:
            self._metadata.expect(tenant, trace_id)
            row = self._store.trace(tenant, trace_id)
        return row, self._store.signals(tenant, trace_id=trace_id, limit=MAX_SIGNALS)[0]

    @contextmanager
    def _compiled(self, tenant: str) -> Iterator[CompiledRules]:
        """The tenant's present rules, compiled for one thread alone: folding learns span names in
        them, so that they are shared neither with the pipeline nor with another query."""
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
) -> Json:
    """By rule id ``verdict``, ``clause``, ``signal`` (its id), ``counts`` and ``evidence``.

    The trace's spans are judged anew, so that this is what the present rules say, also of a trace
    that is older than a rule; signals say what was found by the rules of the time. ``breach``
    is certain: from the spans that could be read, or else because an active signal of the rule as
    it is says so. Where there is none the verdict is ``otherwise``: ``kept``; ``open`` while later
    spans may still break the rule; ``unknown`` where spans of a closed trace could not be read.
    """
    verdicts = {}
    for rule in rules.rules:
        stands = active.get((rule.id, rule.version))
        signal = stands.signal if stands else None
        judged = found.get(rule.id)
        said: Json = {
            "verdict": otherwise,
            "clause": None,
            "signal": signal.id if signal else None,
            "counts": judged.counts if judged else {},
            "evidence": judged.evidence if judged else {},
        }
        if judged is not None and judged.breach:
            said |= {"verdict": "breach", "clause": judged.clause}
        elif signal is not None and otherwise != "kept":
            said |= {
                "verdict": "breach",
                "clause": signal.clause,
                "counts": signal.counts,
                "evidence": signal.evidence,
            }
        verdicts[rule.id] = said
    return verdicts


def _row(held: DueTraces) -> TraceRow:
    """A trace in memory as the index would have it."""
    values = held.rows[0].tolist()
    service = values[ROOT_SERVICE]
    return TraceRow(
        trace_id=held.trace_id(0),
        start_ns=values[MIN_START],
        end_ns=values[MAX_END],
        first_seen_ns=values[FIRST_SEEN],
        last_seen_ns=values[LAST_SEEN],
        spans=values[SPANS],
        errors=values[ERRORS],
        root_name=held.root_name(0),
        root_service=held.services[service] if service else None,
        services=held.service_names(0),
        partial=bool(values[FLAGS] & PARTIAL),
        rules_version=held.rules.version,
        positions=values[POSITION_0 : POSITION_0 + values[POSITION_COUNT]],
    )


class _Frames:
    """The frames of a trace, read one at a time."""

    def __init__(self, log: SpanLog, tenant: str, positions: list[int], max_body: int) -> None:
        self._log = log
        self._tenant = tenant
        self._positions = positions
        self._max_body = max_body
        self.missing = self.omitted = self.unread = 0

    def fold(self, trial: Trial) -> Iterator[bytes]:
        """Add the frames to a trial; those that are to be shown are given on, as protobuf."""
        left = MAX_BYTES
        for number, position in enumerate(self._positions):
            if number == MAX_FRAMES or left <= 0:
                self.unread = len(self._positions) - number
                self.omitted += self.unread
                return
            body = self._body(position)
            room = trial.spans < MAX_SPANS
            try:
                added = trial.add(body) if body is not None else 0
            except TrialError:
                body = None
            if body is None:
                self.missing += 1
                continue
            left -= len(body)
            if room:
                yield body
            elif added:
                self.omitted += 1

    def _body(self, position: int) -> bytes | None:
        try:
            frame: Frame = self._log.read(self._tenant, position)
            payload = bytes(frame.payload)
            return protobuf_body(payload, frame.content_type, frame.encoding, self._max_body)
        except (FrameMissing, FrameCorrupt, BadBody, BodyTooLarge):
            return None
