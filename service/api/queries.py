"""The API's queries, answered by the stores: rules, signals and the trace index, the span log."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from betrace.service.api.backend import Json, RuleExistsError, SignalQuery, TraceQuery
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.api.trace_view import OpenTraces, TraceReader, signal_json, trace_json
from betrace.service.otlp.json import OtlpJsonError, to_protobuf
from betrace.service.receiver.responses import ApiError
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import Rule, RuleConflictError, RuleNotFoundError, etag, make_rule
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.queries import BadQuery, SignalFilter, SummaryRow
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.search import TraceFilter
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.trial import Trial, TrialError, Verdict

_FOR_EVER = 2**63 - 1


class StoreQueries:
    """Answers :class:`betrace.service.api.backend.Queries` from the stores; a trace that is open,
    from memory and the log. May be called from several threads at once.

    ``max_body_bytes`` bounds what a frame of the log is decompressed to.
    """

    def __init__(
        self,
        store: DuckStore,
        metadata: TraceMetadataCache,
        log: SpanLog,
        registry: RuleRegistry,
        open_traces: OpenTraces,
        max_body_bytes: int,
        closed: Container[str] = frozenset(),
    ) -> None:
        self._closed = closed  # tenants that are deleted
        self._duck = store
        self._registry = registry
        self._rules = registry.store
        self._metadata = metadata
        self._reader = TraceReader(
            store, metadata, log, registry.store.rules, open_traces, max_body_bytes
        )
        self._changing = threading.Lock()  # a rule that must be new stays so until it is saved

    # Signals and traces

    def signals(self, tenant: str, query: SignalQuery) -> tuple[list[Json], str | None]:
        with _asking():
            wanted = SignalFilter(
                query.rule, query.severity, query.trace_id, query.status, query.since, query.until
            )
            found, following = self._duck.signals(
                tenant, wanted, limit=query.limit, cursor=query.cursor
            )
        self._metadata.listed(tenant, found)
        return [signal_json(stored) for stored in found], following

    def signal(self, tenant: str, signal_id: str) -> Json | None:
        with _asking():
            found = self._duck.signal(tenant, signal_id)
        return None if found is None else signal_json(found)

    def signal_summary(
        self, tenant: str, since: int, until: int, bucket_ns: int
    ) -> list[SummaryRow]:
        with _asking():
            return self._duck.summary(tenant, since, until, bucket_ns)

    def traces(self, tenant: str, query: TraceQuery) -> tuple[list[Json], str | None, int | None]:
        with _asking():
            wanted = TraceFilter(
                query.service,
                query.name,
                query.min_duration,
                query.has_signal,
                query.since,
            )
            found, following, searched_to = self._duck.traces(
                tenant, wanted, limit=query.limit, cursor=query.cursor
            )
        return [trace_json(row) for row in found], following, searched_to

    def trace(self, tenant: str, trace_id: str) -> Json | None:
        with _asking():
            return self._reader.trace(tenant, trace_id)

    # Rules

    def rules(self, tenant: str) -> list[Json]:
        rules = sorted(self._rules.rules(tenant), key=lambda rule: rule.id)
        active: dict[str, int | None] = {rule.id: 0 for rule in rules}
        try:
            for row in self._duck.summary(tenant, 0, _FOR_EVER, _FOR_EVER):
                active[row.rule_id] = row.raised - row.retracted + (active.get(row.rule_id) or 0)
        except (StoreError, PoolTimeout):  # does not hide the rules, which are files
            active = dict.fromkeys(active)
        return [{**_rule(rule), "active_signals": active[rule.id]} for rule in rules]

    def rule(self, tenant: str, rule_id: str) -> Json:
        return _rule(self._rules.rule(tenant, rule_id))

    def put_rule(
        self, tenant: str, rule_id: str, definition: Json, if_match: str | None
    ) -> tuple[Json, bool]:
        rule = make_rule({**definition, "id": rule_id})
        with self._changing:
            if tenant in self._closed:
                raise ApiError(403, f"the tenant {tenant} is deleted", "see /docs")
            if if_match is None:
                self._must_be_new(tenant, rule_id)
            try:
                created = self._rules.put(tenant, rule_id, rule, if_match=if_match)
            except RuleConflictError:
                self._rules.rule(tenant, rule_id)  # there is none: say that instead
                raise
            except OSError as error:
                raise _unwritable(error) from error
        self._registry.forget(tenant)
        return _rule(rule), created

    def delete_rule(self, tenant: str, rule_id: str, if_match: str) -> None:
        with self._changing:
            self._rules.rule(tenant, rule_id)
            try:
                self._rules.delete(tenant, rule_id, if_match=if_match)
            except OSError as error:
                raise _unwritable(error) from error
        self._registry.forget(tenant)

    def delete_rules(self, tenant: str) -> None:
        """Delete all rules of a tenant that is closed. Raises :exc:`OSError`."""
        with self._changing:
            self._rules.delete_tenant(tenant)
        self._registry.forget(tenant)

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
        return _said(verdict)


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


def _rule(rule: Rule) -> Json:
    return {**rule.definition(), "version": rule.version, "etag": etag(rule)}


def _said(verdict: Verdict) -> Json:
    said = asdict(verdict)
    del said["rule_id"]
    return said
