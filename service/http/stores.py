"""The API's queries, answered by the stores: rules, signals and the trace index, the span log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from google.protobuf.message import DecodeError

from service.http.backend import Json, RuleExistsError, SignalQuery, TraceQuery
from service.http.errors import ApiError
from service.otlp.encoding import EncodingError, decode_body
from service.otlp.json import OtlpJsonError, to_protobuf
from service.otlp.render import trace_as_json
from service.rules.compile import CompiledRules, compile_rules
from service.rules.files import (
    Rule,
    RuleConflictError,
    RuleNotFoundError,
    RuleStore,
    etag,
    make_rule,
)
from service.settings.base import MIB
from service.storage.duck import DuckStore
from service.storage.duckfiles import StoreError
from service.storage.duckqueries import BadQuery, StoredSignal, SummaryRow, TraceRow
from service.storage.frames import Frame
from service.storage.pool import PoolTimeout
from service.storage.spanlog import SpanLog
from service.trial import Trial, TrialError

# What is read to show one trace, at most.
MAX_FRAMES = 2000
MAX_BYTES = 512 * MIB
MAX_SIGNALS = 1000


class StoreQueries:
    """Answers :class:`service.http.backend.Queries` from the stores. Safe from several threads.

    ``compiled`` gives a tenant's compiled rules; ``max_body_bytes`` bounds what a frame of the log
    is decompressed to.
    """

    def __init__(
        self,
        duck: DuckStore,
        log: SpanLog,
        rules: RuleStore,
        compiled: Callable[[str], CompiledRules],
        max_body_bytes: int,
    ) -> None:
        self._duck = duck
        self._log = log
        self._rules = rules
        self._compiled = compiled
        self._max_body = max_body_bytes
        self._changing = threading.Lock()

    # Signals and traces

    def signals(self, tenant: str, query: SignalQuery) -> tuple[list[Json], str | None]:
        with _asking():
            found, following = self._duck.signals(tenant, **asdict(query))
        return [_signal(stored) for stored in found], following

    def signal(self, tenant: str, signal_id: str) -> Json | None:
        with _asking():
            found = self._duck.signal(tenant, signal_id)
        return None if found is None else _signal(found)

    def signal_summary(
        self, tenant: str, since: int, until: int, bucket_ns: int
    ) -> list[SummaryRow]:
        with _asking():
            return self._duck.summary(tenant, since, until, bucket_ns)

    def traces(self, tenant: str, query: TraceQuery) -> tuple[list[Json], str | None]:
        with _asking():
            found, following = self._duck.traces(tenant, **asdict(query))
        return [_row(row) for row in found], following

    def trace(self, tenant: str, trace_id: str) -> Json | None:
        with _asking():
            row = self._duck.trace(tenant, trace_id)
            if row is None:
                return None
            signals, _ = self._duck.signals(tenant, trace_id=trace_id, limit=MAX_SIGNALS)
        reader = _TraceReader(self._log, tenant, row.positions, self._max_body)
        trial = Trial(self._compiled(tenant), trace_id)

        def bodies() -> Iterator[bytes]:
            for body in reader.bodies():
                trial.add(body)
                yield body

        shown = trace_as_json(bodies(), bytes.fromhex(trace_id))
        try:
            verdicts = {v.rule_id: _without_id(asdict(v)) for v in trial.verdicts()}
        except TrialError:  # the log no longer has its frames
            verdicts = {}
        return {
            **_row(row),
            **shown,
            "missingFrames": reader.missing,
            "signals": [_signal(stored) for stored in signals],
            "verdicts": verdicts,
        }

    # Rules

    def rules(self, tenant: str) -> list[Json]:
        return [_rule(rule) for rule in sorted(self._rules.rules(tenant), key=lambda r: r.id)]

    def rule(self, tenant: str, rule_id: str) -> Json:
        return _rule(self._rules.rule(tenant, rule_id))

    def put_rule(
        self, tenant: str, rule_id: str, definition: Json, if_match: str | None
    ) -> tuple[Json, bool]:
        rule = make_rule({**definition, "id": rule_id})
        with self._changing:
            if if_match is None:
                self._must_be_new(tenant, rule_id)
            try:
                created = self._rules.put(tenant, rule_id, rule, if_match=if_match)
            except RuleConflictError:
                self._rules.rule(tenant, rule_id)  # there is none: say that instead
                raise
            except OSError as error:
                raise _unwritable(error) from error
        return _rule(rule), created

    def delete_rule(self, tenant: str, rule_id: str, if_match: str) -> None:
        with self._changing:
            self._rules.rule(tenant, rule_id)
            try:
                self._rules.delete(tenant, rule_id, if_match=if_match)
            except OSError as error:
                raise _unwritable(error) from error

    def _must_be_new(self, tenant: str, rule_id: str) -> None:
        try:
            present = self._rules.rule(tenant, rule_id)
        except RuleNotFoundError:
            return
        raise RuleExistsError(etag(present))

    def test_rule(self, condition: str, trace: bytes) -> Json:
        rule = make_rule({"id": "trial", "condition": condition})
        trial = Trial(compile_rules([rule]))
        try:
            trial.add(to_protobuf(trace))
            (verdict,) = trial.verdicts()
        except (OtlpJsonError, TrialError) as error:
            raise ApiError(
                400,
                f"the trace cannot be judged: {error}",
                'send OTLP JSON: {"resourceSpans": […]}, with the spans of one trace',
            ) from error
        return _without_id(asdict(verdict))


class _TraceReader:
    """The bodies of a trace's frames, one at a time; ``missing`` counts those that could not be
    read or were too many."""

    def __init__(self, log: SpanLog, tenant: str, positions: list[int], max_body: int) -> None:
        self._log = log
        self._tenant = tenant
        self._positions = positions[:MAX_FRAMES]
        self._max_body = max_body
        self.missing = len(positions) - len(self._positions)

    def bodies(self) -> Iterator[bytes]:
        left = MAX_BYTES
        for position in self._positions:
            (frame,) = self._log.read_many(self._tenant, [position])
            body = self._decode(frame) if isinstance(frame, Frame) else None
            left -= len(body or b"")
            if body is None or left < 0:
                self.missing += 1
            else:
                yield body

    def _decode(self, frame: Frame) -> bytes | None:
        try:
            body = decode_body(bytes(frame.payload), frame.encoding, self._max_body)
            return to_protobuf(body) if frame.content_type == "json" else body
        except (EncodingError, OtlpJsonError, DecodeError):
            return None


@contextmanager
def _asking() -> Iterator[None]:
    """Turn what the store raises into an answer."""
    try:
        yield
    except BadQuery as error:
        raise ApiError(400, str(error), "see /docs") from error
    except (StoreError, PoolTimeout) as error:
        raise ApiError(
            503,
            f"the store cannot answer: {error}",
            "try again; see its component at /readyz",
            {"retry-after": "5"},
        ) from error


def _unwritable(error: OSError) -> ApiError:
    return ApiError(
        503,
        f"the rule cannot be written ({error.strerror or error})",
        "make room on the disk, or let the service write there; then try again",
        {"retry-after": "5"},
    )


def _signal(stored: StoredSignal) -> Json:
    return {**stored.signal.to_json(), "status": stored.status}


def _row(row: TraceRow) -> Json:
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


def _rule(rule: Rule) -> Json:
    return {**rule.definition(), "version": rule.version, "etag": etag(rule)}


def _without_id(verdict: dict[str, Any]) -> Json:
    return {name: value for name, value in verdict.items() if name != "rule_id"}
