"""Endpoints: one description serves routing, checking and documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, TypeVarTuple

import orjson
import trio

from betrace.channels import ThreadRunner, ThreadTimeout
from betrace.service.api.audit import AuditTrail, Operator
from betrace.service.api.errors import ApiError, unavailable
from betrace.service.api.metrics.exposition import Exposition
from betrace.service.api.params import Param, near
from betrace.service.api.performance import Performance
from betrace.service.api.rule_writer import RuleWriter
from betrace.service.api.sources import Sources
from betrace.service.api.subscriptions import Subscriptions
from betrace.service.api.tenant_administration import TenantAdministration
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.api.trace_view import TraceReader
from betrace.service.api.turns import TenantTurns
from betrace.service.api.unstored_signals import UnstoredSignals
from betrace.service.storage.duck.queries import StoredSignal
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.triage import TriageStore
from betrace.service.storage.undecided import UndecidedStore

if TYPE_CHECKING:
    from betrace.service.cluster.query.shared_triage import SharedTriage

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

Access = Literal["tenant", "operator", "scrape", "none"]
"""Who may call an endpoint: tenants, operators, readers of metrics, or anyone."""
JSON_TYPE = "application/json"
HTML_TYPE = "text/html; charset=utf-8"
EVENTS_TYPE = "text/event-stream"
OPERATOR_HEADER = "x-operator"
COMPUTING = 2
"""How many calls that compute for seconds may run at once, for all tenants together."""
APPLIED_HEADER = "BeTrace-Applied"
"""Says in answers of a query node how far each partition is applied."""
KEEP_ALIVE = 15.0
"""Seconds between comments on a silent stream, so that proxies and clients keep it open."""

_OPERATOR = re.compile(r"[\w.@+-]{1,64}")


@dataclass(slots=True)
class Answer:
    """A response other than 200 with JSON. ``body`` is a JSON value, bytes to send unchanged, or
    an iterator over the parts of a stream."""

    body: Any
    status: int = 200
    media_type: str = JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Tools:
    """What endpoints work with; filled by :mod:`betrace.service.app.builder`."""

    sources: Sources
    store: DuckStore
    metadata: TraceMetadataCache
    reader: TraceReader
    rule_writer: RuleWriter
    subscriptions: Subscriptions
    tenants: TenantAdministration
    audit: AuditTrail
    triage: TriageStore
    undecided: UndecidedStore
    performance: Performance
    exposition: Exposition
    threads: ThreadRunner
    """For calls that block."""
    unstored: UnstoredSignals = field(default_factory=UnstoredSignals)
    turns: TenantTurns = field(init=False)
    """How tenants share the threads."""
    computing: ThreadRunner = field(default_factory=lambda: ThreadRunner("compute", COMPUTING))
    """For calls that may compute for seconds; one tenant may have one at a time."""
    computing_turns: TenantTurns = field(default_factory=lambda: TenantTurns(COMPUTING))
    shared_triage: SharedTriage | None = None
    """Changes what people decided at all query nodes of a cluster."""
    streams: Counter[str] = field(default_factory=Counter)
    """Open event streams, by tenant; operators' are under an empty name."""

    def __post_init__(self) -> None:
        self.turns = TenantTurns(self.threads.statistics().threads)

    @property
    def triage_writer(self) -> TriageStore | SharedTriage:
        """Where mutes and acknowledgements are changed."""
        return self.triage if self.shared_triage is None else self.shared_triage

    def signal(self, tenant: str, signal_id: str) -> StoredSignal | None:
        """A signal, also if it is not stored yet. Blocks."""
        stored = self.store.signal(tenant, signal_id)
        if stored is not None:
            return stored
        found = self.unstored.find(tenant, signal_id)
        return found and StoredSignal(found[0], "active" if found[1] else "retracted", 0)


@dataclass(slots=True)
class Call:
    """A checked request: the caller's ``tenant`` (empty where none is needed) and address
    ``client``, the values of the query and path ``params``, lower-case ``headers``, the body."""

    tools: Tools
    tenant: str
    params: dict[str, Any]
    headers: dict[str, str]
    body: bytes
    client: str

    async def blocking(self, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """Call a blocking function in a thread. Raises :exc:`ApiError` 503 after
        ``api.query_timeout_seconds``; the call may then still be running."""
        return await self._call(self.tools.threads, self.tools.turns, function, *args)

    async def compute(self, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """:meth:`blocking` for what may compute for seconds."""
        return await self._call(self.tools.computing, self.tools.computing_turns, function, *args)

    async def _call(
        self, threads: ThreadRunner, turns: TenantTurns, function: Callable[[*Ts], R], *args: *Ts
    ) -> R:
        timeout = self.tools.sources.settings.api.query_timeout_seconds
        deadline = trio.current_time() + timeout
        try:
            release = await turns.take(self.tenant, timeout)
        except trio.TooSlowError:
            raise unavailable(
                "other queries of this tenant use its share of the query threads",
                "wait for their results, or send fewer at once",
            ) from None

        started = False

        def run() -> R:
            nonlocal started
            started = True
            try:
                return function(*args)
            finally:  # also in a thread that was left behind
                release()

        try:
            left = max(0.001, deadline - trio.current_time())
            return await threads.run(run, timeout=left)
        except ThreadTimeout:
            raise unavailable(
                f"the query took longer than {timeout:g} s",
                "narrow it (since, until, limit) or try again later",
            ) from None
        finally:
            if not started:
                release()

    def operator(self) -> Operator:
        """Who acts, by the name in ``X-Operator`` if there is one."""
        name = self.headers.get(OPERATOR_HEADER, "")
        if name and not _OPERATOR.fullmatch(name):
            raise ApiError(
                400,
                "the header X-Operator is not a valid name",
                "use 1 to 64 letters, digits or . _ @ + -",
            )
        return Operator(name or "operator", self.client)

    def person(self) -> Operator:
        """Who acts for a tenant: the name in ``X-Operator``, or else the tenant."""
        who = self.operator()
        return who if OPERATOR_HEADER in self.headers else Operator(self.tenant, who.client)

    async def note(self, action: str, **target: Any) -> None:
        """Write the operator's action to the audit log; call this before acting."""
        await self.tools.audit.note(self.operator(), action, target)

    def json(self, required: dict[str, type], optional: dict[str, type]) -> dict[str, Any]:
        """The fields of the JSON object in the body. Raises :exc:`ApiError` 400."""
        example = ", ".join(f'"{name}": …' for name in required)
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is not JSON: {error}", f"send {{{example}}}") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body is not a JSON object", f"send {{{example}}}")
        known = required | optional
        for name, item in value.items():
            if name not in known:
                raise ApiError(400, f"unknown field {name[:80]!r} in the body", near(name, known))
            if type(item) is not known[name]:
                word = _JSON_NAMES[known[name]]
                raise ApiError(400, f"the field {name} has the wrong type", f"it must be {word}")
        for name in required:
            if name not in value:
                raise ApiError(
                    400, f"the field {name} is missing from the body", f"send {{{example}}}"
                )
        return value

    def stream(self, source: Callable[[], AsyncIterator[bytes]]) -> Answer:
        """A stream of server-sent events from an async generator. Raises :exc:`ApiError` 503
        when ``api.max_streams`` are open. A tenant may have half of them, and the last tenth is for
        operators."""
        tools, tenant = self.tools, self.tenant
        opened, most = tools.streams.total(), tools.sources.settings.api.max_streams
        allowed = most if not tenant else max(1, most - most // 10)
        if opened >= allowed or (tenant and tools.streams[tenant] >= max(1, most // 2)):
            raise unavailable(
                f"{tools.streams[tenant]} streams of this caller are open already, {opened} in all",
                "close one, or raise api.max_streams",
            )

        async def counted() -> AsyncIterator[bytes]:
            # Counted while it runs, because a generator that never starts is never closed.
            tools.streams[tenant] += 1
            parts = source()
            try:
                yield b": connected\n\n"
                async for part in parts:
                    yield part
            finally:
                tools.streams[tenant] -= 1
                if not tools.streams[tenant]:
                    del tools.streams[tenant]
                with trio.CancelScope(shield=True):
                    await parts.aclose()  # type: ignore[attr-defined]

        return Answer(counted(), media_type=EVENTS_TYPE, headers={"cache-control": "no-store"})


_JSON_NAMES = {
    str: "text",
    dict: "an object",
    bool: "true or false",
    list: "a list",
    int: "an integer",
}


def event(name: str, data: Any, identity: str | None = None) -> bytes:
    """A server-sent event (WHATWG HTML, section 9.2)."""
    head = f"id: {identity}\n" if identity else ""
    return f"{head}event: {name}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint. ``path`` has its parameters in braces. ``answers`` gives the meaning of each
    status; the documentation adds those of the checks that all endpoints share."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    description: str = ""
    params: tuple[Param, ...] = ()
    path_params: tuple[Param, ...] = ()
    body: dict[str, Any] | None = None
    answers: dict[int, str] = field(default_factory=dict)
    media_type: str = JSON_TYPE
    access: Access = "tenant"
    reads: bool = False
    """Whether it changes nothing, so that read-only tokens may call it."""


class Endpoints:
    """The endpoints that a module declares with :meth:`add`."""

    def __init__(self, tag: str, access: Access = "tenant") -> None:
        self.tag = tag
        self.access = access
        self.all: list[Endpoint] = []

    def add(
        self,
        method: str,
        path: str,
        summary: str,
        *,
        params: Iterable[Param] = (),
        path_params: Iterable[Param] = (),
        body: dict[str, Any] | None = None,
        answers: dict[int, str] | None = None,
        media_type: str = JSON_TYPE,
        access: Access | None = None,
        reads: bool | None = None,
    ) -> Callable[[Handler], Handler]:
        """Declare the decorated function as the handler of ``method path``; its docstring is the
        description. ``access`` defaults to that of the list; ``reads``, whether it changes nothing,
        is true for GET."""

        def declare(handler: Handler) -> Handler:
            self.all.append(
                Endpoint(
                    method,
                    path,
                    handler,
                    summary,
                    self.tag,
                    " ".join((handler.__doc__ or "").split()),
                    tuple(params),
                    tuple(path_params),
                    body,
                    answers or {},
                    media_type,
                    access or self.access,
                    method == "GET" if reads is None else reads,
                )
            )
            return handler

        return declare
