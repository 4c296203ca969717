"""What the API needs from the service; :mod:`betrace.service.app` implements it.

Methods that are not ``async`` and belong to :class:`Queries` may block: the API calls them in
threads of its own, with a timeout. Those of :class:`Backend` are called on the Trio thread and only
look at what is in memory. Times are nanoseconds since 1970, ids lower-case hex; results are JSON
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from betrace.service.storage.duck.queries import SummaryRow

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SignalQuery:
    """Which signals, newest first; ``cursor`` as the page before gave it."""

    rule: str | None = None
    severity: str | None = None
    trace_id: str | None = None
    status: str | None = None
    since: int | None = None  # detected_at >= since
    until: int | None = None  # detected_at < until
    limit: int = 100
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class TraceQuery:
    """Which traces, newest first; ``cursor`` as the page before gave it."""

    service: str | None = None
    name: str | None = None
    min_duration: int | None = None  # nanoseconds
    since: int | None = None  # start >= since
    has_signal: bool | None = None
    limit: int = 100
    cursor: str | None = None


class RuleExistsError(Exception):
    """The rule was to be created but exists; ``etag`` is its entity tag, in quotes."""

    def __init__(self, etag: str) -> None:
        super().__init__(etag)
        self.etag = etag


class Queries(Protocol):
    """Blocking calls, made in worker threads. They may raise
    :exc:`betrace.service.receiver.responses.ApiError`, such as 400 for a cursor that is none."""

    def signals(self, tenant: str, query: SignalQuery) -> tuple[Sequence[Json], str | None]:
        """Signals as :meth:`betrace.service.signals.Signal.to_json` gives them, with ``status``;
        and the cursor of the next page, None after the last."""

    def signal(self, tenant: str, signal_id: str) -> Json | None:
        """One signal, None if the tenant has no such signal."""

    def signal_summary(
        self, tenant: str, since: int, until: int, bucket_ns: int
    ) -> Sequence[SummaryRow]:
        """Counts of signals raised with since <= detected_at < until."""

    def traces(
        self, tenant: str, query: TraceQuery
    ) -> tuple[Sequence[Json], str | None, int | None]:
        """Rows of the trace index, ``start`` and ``end`` in nanoseconds; the cursor of the next
        page, None after the last; and back to when was searched, where that took so long that
        the page ended before it was full, None otherwise."""

    def trace(self, tenant: str, trace_id: str) -> Json | None:
        """The trace, open or closed, as :meth:`betrace.service.api.trace_view.TraceReader.trace`
        gives it; None if the tenant has no such trace."""

    def rules(self, tenant: str) -> Sequence[Json]:
        """The tenant's rules, by id: the fields of a rule file, ``version``, ``etag`` and
        ``active_signals`` (how many, None while the store cannot say)."""

    def rule(self, tenant: str, rule_id: str) -> Json:
        """One rule. Raises :exc:`betrace.service.rules.store.RuleNotFoundError`."""

    def put_rule(
        self, tenant: str, rule_id: str, definition: Json, if_match: str | None
    ) -> tuple[Json, bool]:
        """Check and save a rule, keeping the versions before it; the rule as :meth:`rule` gives
        it, and whether it is new. ``if_match`` is the header's value, None to create.
        Raises :exc:`RuleExistsError`, :exc:`betrace.service.rules.store.RuleFileError` for a
        wrong definition, and those of :meth:`betrace.service.rules.store.RuleStore.put`."""

    def delete_rule(self, tenant: str, rule_id: str, if_match: str) -> None:
        """Delete a rule. Raises as :meth:`betrace.service.rules.store.RuleStore.delete`."""

    def test_rule(self, condition: str, trace: bytes) -> Json:
        """What the rule says of a trace (OTLP JSON): ``breach``, ``clause``, ``counts``,
        ``evidence``. Raises :exc:`betrace.service.rules.store.RuleFileError`."""


class Subscription(Protocol):
    """Signals as they are stored; a receiving end of a Trio memory channel is one."""

    async def receive(self) -> Json:
        """The next signal. Raises :exc:`trio.EndOfChannel` when the service stops."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Operator:
    """Who acts: a name, which with the operator token anyone may choose, and an address."""

    name: str
    client: str


class AuditError(Exception):
    """An action was not done since it could not be written to the audit log."""


class Administration(Protocol):
    """What operators can do. Actions are in the audit log before they are done, or raise
    :exc:`AuditError`; :exc:`betrace.service.storage.dead_letters.DeadLetterError` where the disk
    fails."""

    def breakers(self) -> Sequence[Json]:
        """All circuit breakers, ``name`` first."""

    async def act_on_breaker(self, who: Operator, name: str, action: str) -> Json:
        """The breaker after an action, one of :data:`betrace.service.pipeline.breakers.ACTIONS`."""

    async def dead_letters(
        self, stage: str | None, tenant: str | None, limit: int, after: int
    ) -> tuple[Sequence[Json], int | None]:
        """Letters with an id above ``after``, oldest first; and the last id if there are more."""

    async def dead_letter(self, letter_id: int) -> Json | None:
        """A letter with its ``payload``, None if there is none of that id."""

    async def retry_dead_letters(
        self, who: Operator, letter_id: int | None, stage: str | None, tenant: str | None
    ) -> int:
        """Have letters tried again now: one, or all that the filters let through; how many."""

    async def discard_dead_letter(self, who: Operator, letter_id: int) -> bool:
        """Delete a letter for good; whether it was there and not under way."""

    def fallbacks(self) -> Sequence[Json]:
        """What waits in local files, by store."""

    async def write_back_now(self, who: Operator) -> None:
        """Do not wait for the next try to write the files back."""

    async def checkpoint(self) -> Json:
        """The last checkpoint: when, what it covers, and what a restart would read of the log."""

    async def save_checkpoint(self, who: Operator) -> bool | None:
        """Save a checkpoint; False where the disk fails, None where the stores take too long."""

    @property
    def caches(self) -> Sequence[str]:
        """The names of the caches."""

    async def invalidate_cache(self, who: Operator, name: str, tenant: str | None) -> int:
        """Drop the entries of a cache, of one tenant or of all; how many there were."""

    async def warm_up_caches(self, who: Operator) -> Json:
        """Fill the caches for the active tenants: ``tenants``, ``loaded``, ``failed`` and
        ``seconds``."""

    def pipeline(self) -> Json:
        """``ingestion``, ``drained``, ``waiting`` and ``stages``."""

    async def pause(self, who: Operator) -> Json:
        """Refuse new spans; the pipeline."""

    async def resume(self, who: Operator) -> Json:
        """Accept spans again; the pipeline."""

    async def drain(self, who: Operator, wait_seconds: float) -> Json:
        """Refuse new spans and wait until nothing is under way, at most so long; the pipeline."""


class Tenants(Protocol):
    """What operators can do with tenants. Actions are in the audit log before they are done, or
    raise :exc:`AuditError`; otherwise see :mod:`betrace.service.tenancy.directory` for what is
    raised. A tenant is ``name``, ``state``, ``createdAt``, ``quota`` and ``keys``."""

    async def page(self, after: str, limit: int) -> tuple[Sequence[Json], str | None]:
        """Tenants by name beyond ``after``; and the name to go on from, None after the last."""

    async def get(self, name: str) -> Json | None:
        """A tenant, None if there is none."""

    async def create(
        self, who: Operator, name: str, quota: int | None, public_key: str | None
    ) -> Json:
        """The new tenant; its key is in PEM."""

    async def set_quota(self, who: Operator, name: str, quota: int | None) -> Json:
        """The tenant with its new quota, in spans a second."""

    async def add_key(
        self, who: Operator, name: str, public_key: str, grace_seconds: float
    ) -> Json:
        """The tenant with one key more; its other keys soon expire."""

    async def revoke_key(self, who: Operator, name: str, kid: str) -> Json:
        """The tenant with one key less."""

    async def delete(self, who: Operator, name: str, wait_seconds: float) -> bool:
        """Delete a tenant with all its data; whether it was done within so many seconds."""


class Backend(Protocol):
    """The running service."""

    @property
    def admin(self) -> Administration: ...

    @property
    def tenants(self) -> Tenants: ...

    @property
    def queries(self) -> Queries: ...

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here: started, and not draining."""

    def components(self) -> Mapping[str, Json]:
        """By name: ``status`` (starting, ok, degraded, failed, stopping) and ``detail``."""

    async def scrape(self) -> bytes:
        """All metrics in Prometheus' text format. Raises :exc:`channels.ThreadTimeout`."""

    def subscribe_signals(self, tenant: str) -> Subscription:
        """The tenant's signals from now on."""

    def queue_stats(self) -> Sequence[Json]:
        """A row for each channel (docs/http-api.md), ``name`` first."""

    def cache_stats(self) -> Mapping[str, Json]:
        """Statistics by cache."""

    def performance_metrics(self) -> Json: ...

    def trace_windows(self) -> Json: ...

    def system_stats(self) -> Json: ...
