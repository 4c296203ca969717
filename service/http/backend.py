"""What the API needs from the service; :mod:`service.app` implements it.

Methods that are not ``async`` and belong to :class:`Queries` may block: the API calls them in
threads of its own, with a timeout. Those of :class:`Backend` are called on the Trio thread and only
look at what is in memory. Times are nanoseconds since 1970, ids lower-case hex; results are JSON
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SignalQuery:
    """Which signals, newest first. ``after`` is the detected_at and id of the last one seen."""

    rule: str | None = None
    severity: str | None = None
    trace_id: str | None = None
    status: str | None = None
    since: int | None = None  # detected_at >= since
    until: int | None = None  # detected_at < until
    limit: int = 100
    after: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class TraceQuery:
    """Which traces, newest first. ``after`` is the start and trace id of the last one seen."""

    service: str | None = None
    name: str | None = None
    min_duration_ns: int | None = None
    since: int | None = None  # start >= since
    has_signal: bool | None = None
    limit: int = 100
    after: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """Signals of one rule and severity in one bucket of time."""

    bucket: int  # its start
    rule_id: str
    severity: str
    count: int


class RuleConflictError(Exception):
    """The rule is not at the revision that the caller expected. ``current`` is its revision, None
    if there is no such rule."""

    def __init__(self, current: str | None) -> None:
        super().__init__(f"the rule is at revision {current}")
        self.current = current


@dataclass
class RuleInvalidError(Exception):
    """The rule cannot be saved: each error has ``message`` and ``hint``, those of the condition
    also ``line`` and ``column``."""

    errors: list[Json] = field(default_factory=list)


class RuleReadOnlyError(Exception):
    """The rule comes from a file (named by the text) and cannot be changed here."""


class TraceInvalidError(ValueError):
    """A trace to test with cannot be decoded; the text says why."""


class Queries(Protocol):
    """Blocking calls, made in worker threads."""

    def signals(self, tenant: str, query: SignalQuery) -> Sequence[Json]:
        """Signals as :meth:`service.signals.Signal.to_json` gives them, with ``status``."""

    def signal(self, tenant: str, signal_id: str) -> Json | None:
        """One signal, None if the tenant has no such signal."""

    def signal_summary(
        self, tenant: str, since: int, until: int, bucket_ns: int
    ) -> Sequence[SummaryRow]:
        """Counts of signals with since <= detected_at < until; buckets start at ``since``."""

    def traces(self, tenant: str, query: TraceQuery) -> Sequence[Json]:
        """Rows of the trace index: ``trace_id``, ``start`` and ``end`` (ns), ``duration_ns``,
        ``spans``, ``root_service``, ``root_name``, ``services``, ``signals`` (how many)."""

    def trace(self, tenant: str, trace_id: str) -> Json | None:
        """The trace: its row of the index, ``resourceSpans`` (OTLP JSON), ``signals`` and
        ``verdicts`` (by rule id); None if the tenant has no such trace."""

    def rules(self, tenant: str) -> Sequence[Json]:
        """The tenant's rules, by id: the fields of a rule file, ``version`` and ``revision``
        (text that changes with every change of the rule)."""

    def rule(self, tenant: str, rule_id: str) -> Json | None:
        """One rule, None if there is none."""

    def put_rule(self, tenant: str, rule_id: str, rule: Json, expected: str | None) -> Json:
        """Check and save a rule, keeping the versions before it, and return it as :meth:`rule`
        does. ``expected`` is the revision to replace, ``*`` for whichever, None to create.
        Raises :exc:`RuleConflictError`, :exc:`RuleInvalidError`, :exc:`RuleReadOnlyError`."""

    def delete_rule(self, tenant: str, rule_id: str, expected: str) -> None:
        """Delete a rule; ``expected`` and errors as with :meth:`put_rule`."""

    def test_rule(self, condition: str, trace: bytes) -> Json:
        """What the rule says of a trace (OTLP JSON): ``breach``, ``clause``, ``counts``,
        ``evidence``. Raises :exc:`service.rules.parse.RuleSyntaxError` and
        :exc:`TraceInvalidError`."""


class Subscription(Protocol):
    """Signals as they are stored; a receiving end of a Trio memory channel is one."""

    async def receive(self) -> Json:
        """The next signal. Raises :exc:`trio.EndOfChannel` when the service stops."""

    def close(self) -> None: ...


class Backend(Protocol):
    """The running service."""

    @property
    def queries(self) -> Queries: ...

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here: started, and not draining."""

    def components(self) -> Mapping[str, Json]:
        """By name: ``status`` (starting, ok, degraded, failed, stopping) and ``detail``."""

    def metrics_exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""

    def subscribe_signals(self, tenant: str) -> Subscription:
        """The tenant's signals from now on."""

    def queue_stats(self) -> Sequence[Json]:
        """A row for each channel (docs/http-api.md), ``name`` first."""

    def cache_stats(self) -> Mapping[str, Json]:
        """Statistics by cache."""

    def performance_metrics(self) -> Json: ...

    def trace_windows(self) -> Json: ...

    def system_stats(self) -> Json: ...
