"""Admission of requests: what happens to a request before and after the pipeline, without any
framework (OTLP/HTTP 1.x: opentelemetry-proto, docs/specification.md).

A listener calls, for each request::

    head = await edge.admit(method, path, headers)   # a Head, or the HttpResponse that refuses it
    with edge.body(head) as body:                    # limits apply while the body arrives
        refusal = body.feed(chunk)                   # None, or the HttpResponse that refuses it
        response = await edge.handle(head, body.take())

A listener that keeps the body itself calls ``body.reserve(size)`` instead of ``feed`` and passes
its own bytes to ``handle``.

Everything here runs on the Trio thread for each request, so it is limited to dictionary lookups. If
a client disconnects while its request is queued, its spans are still accepted.

The weight of a request is its estimated number of spans, because counting them needs the decoded
body: its length divided by the running mean of bytes per span of the same tenant, content type
and encoding. Each answer of the pipeline updates the mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import trio

from betrace.channels import SendChannel
from betrace.service.config.edge import Ingest
from betrace.service.otlp.response import export_response
from betrace.service.pipeline.request import Done, Refused, Reply, Request
from betrace.service.receiver.responses import (
    JSON,
    MEDIA_TYPES,
    PROTOBUF,
    Headers,
    HttpResponse,
    export_error,
    respond,
)
from betrace.service.receiver.shares import Shares
from betrace.service.tenancy.authentication import (
    Authenticator,
    Denied,
    claimed_tenant,
    closed_tenant,
)
from betrace.service.tenancy.quotas import SpanQuotas
from betrace.service.tenants import DEFAULT_TENANT

PATHS = frozenset({"/v1/traces", "/api/otlp/traces"})
ENCODINGS = {"": "", "identity": "", "gzip": "gzip", "x-gzip": "gzip", "zstd": "zstd"} | {
    "deflate": "deflate"
}
# Signals other than traces: the reason they are counted as, and the variable that turns them off.
OTHER_SIGNALS = {
    "/v1/logs": ("logs", "OTEL_LOGS_EXPORTER"),
    "/v1/metrics": ("metrics", "OTEL_METRICS_EXPORTER"),
}
REASONS = (
    "not_found",
    "logs",
    "metrics",
    "method",
    "unauthenticated",
    "tenant",
    "type",
    "too_large",
    "undecodable",
    "quota",
    "backlog",
    "overloaded",
    "memory",
    "slow_body",
    "slow_head",
    "malformed",
    "paused",
    "draining",
    "unavailable",
)

# Bytes of a span before the first answer, by content type; compressed bodies are smaller.
_FIRST_GUESS = {PROTOBUF: 400.0, JSON: 900.0}
_COMPRESSION = 7.0
# Limit of the spans that are queued or wait to be queued, as a multiple of the capacity. Waiting in
# vain costs more than everything else done for a request: hundreds of such requests took most of
# Trio's thread.
_MOST_WAITING = 1.1
_MOST_ESTIMATES = 10_000  # of tenants, content types and encodings; the oldest is forgotten
_MEMORY = 0.98  # weight of the past in running means: about the last 50 requests count


@dataclass(frozen=True, slots=True)
class Head:
    """The headers of an admitted request. ``length`` is the announced length of the body in bytes,
    None for a chunked body."""

    tenant: str
    content_type: str
    encoding: str
    length: int | None


_UNKNOWN = Head(DEFAULT_TENANT, JSON, "", None)  # of requests without readable headers


class Edge:
    """Admits requests, queues them and answers them.

    ``capacity`` is that of the queue, in spans; ``closed`` are the deleted tenants; ``backlogged``
    says whether a tenant must wait because too many of its spans wait to be folded. Under load,
    tenants share the queue and the memory for bodies (:mod:`betrace.service.receiver.shares`).
    ``refused_spans`` and ``refused_requests`` count refusals by reason (``REASONS``); spans are
    estimated.
    """

    def __init__(
        self,
        settings: Ingest,
        queue: SendChannel[Request],
        quotas: SpanQuotas,
        authenticator: Authenticator | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        capacity: int = 10_000,
        closed: Container[str] = frozenset(),
        backlogged: Callable[[str], bool] = lambda tenant: False,
    ) -> None:
        self._closed_tenants = closed
        self._backlogged = backlogged
        self._spans = Shares(capacity, settings.refuse_above)
        self._give_back_spans = self._spans.give_back
        self._bytes = Shares(settings.max_buffered_bytes, settings.refuse_above)
        self._queue = queue
        self._quotas = quotas
        self._authenticator = authenticator
        self._clock_ns = clock_ns
        self._max_body: Final = settings.max_body_bytes
        self._offer_timeout: Final = settings.offer_timeout_ms / 1000
        self.answer_timeout: Final = settings.answer_timeout_seconds
        self._retry_min: Final = settings.retry_after_min_seconds
        self._retry_max: Final = settings.retry_after_max_seconds
        self._closed: tuple[str, str] | None = None  # reason, message
        self._requests = 0  # admitted, and not answered
        self._settled: trio.Event | None = None
        self._refusals = 0.0  # recent fraction of requests refused for load
        self._bytes_per_span = {
            (kind, encoding): size / (_COMPRESSION if encoding else 1)
            for kind, size in _FIRST_GUESS.items()
            for encoding in ENCODINGS.values()
        }
        # By tenant, content type and encoding: bytes and spans, recent ones counting more.
        self._seen: dict[tuple[str, str, str], tuple[float, float]] = {}
        self._complete = {kind: self._accepted(kind, Done(0)) for kind in MEDIA_TYPES}
        self.accepted_requests = 0
        self.refused_requests = dict.fromkeys(REASONS, 0)
        self.refused_spans = dict.fromkeys(REASONS, 0)

    # For the service.

    def pause(self) -> None:
        """Refuse new requests until :meth:`resume`."""
        self._closed = ("paused", "ingestion is paused by an operator; send the spans again later")

    def drain(self) -> None:
        """Refuse new requests for good, because the service stops."""
        self._closed = ("draining", "the service is shutting down; send the spans again")

    def resume(self) -> None:
        """Accept requests again after :meth:`pause`. Does nothing while draining."""
        if self.state == "paused":
            self._closed = None

    async def settled(self) -> None:
        """Return when every admitted request is answered, or its client is gone."""
        if self._requests:
            self._settled = trio.Event()
            await self._settled.wait()

    @property
    def state(self) -> str:
        """``open``, ``paused`` or ``draining``."""
        return "open" if self._closed is None else self._closed[0]

    # For each request.

    async def admit(self, method: str, path: str, headers: Headers) -> Head | HttpResponse:
        """Check everything that can be checked before the body is read. Names of headers are lower
        case."""
        if self._authenticator is None:
            return self._check(method, path, headers, None)
        authorization = None
        for name, value in headers:
            if name == b"authorization":
                authorization = value.decode("latin-1")
        caller: str | Denied | None = None
        if authorization is not None:
            caller = self._authenticator.remembered(authorization)
        if caller is None:
            caller = await self._authenticator.tenant(authorization)
        return self._check(method, path, headers, caller)

    def _check(
        self, method: str, path: str, headers: Headers, caller: str | Denied | None
    ) -> Head | HttpResponse:
        type_header = encoding_header = b""
        length_header = None
        tenant_header: str | None = None
        for name, value in headers:
            if name == b"content-type":
                type_header = value
            elif name == b"content-length":
                length_header = value
            elif name == b"content-encoding":
                encoding_header = encoding_header + b"," + value if encoding_header else value
            elif name == b"x-scope-orgid":
                tenant_header = value.decode("latin-1")
        kind = _content_type(type_header)
        encoding = _encoding(encoding_header)
        length = int(length_header) if length_header and length_header.isdigit() else None
        head = Head(DEFAULT_TENANT, kind or JSON, encoding or "", length)
        if path not in PATHS:
            if path in OTHER_SIGNALS:
                signal, variable = OTHER_SIGNALS[path]
                message = f"BeTrace takes traces, not {signal}; set {variable}=none in the client"
                return self._refuse(head, 404, signal, message, spans=0)
            message = f"{path[:200]} does not exist; send traces to /v1/traces"
            if path == "/":
                message = (
                    "/ does not exist; send traces to /v1/traces: set "
                    "OTEL_EXPORTER_OTLP_ENDPOINT without a path, or "
                    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT with it"
                )
            return self._refuse(head, 404, "not_found", message)
        if method != "POST":
            return self._refuse(
                head, 405, "method", f"use POST, not {method[:20]}", (b"allow", b"POST")
            )
        if isinstance(caller, Denied):
            challenge = [(b"www-authenticate", b"Bearer")] if caller.status == 401 else []
            if caller.status == 503:
                challenge = [self._retry_after(self._retry_max)]
            return self._refuse(head, caller.status, "unauthenticated", caller.message, *challenge)
        if kind is None:
            shown = type_header.decode("latin-1")[:100]
            message = f"content type {shown!r} is not supported" if shown else "no content type"
            message += "; send application/x-protobuf or application/json"
            return self._refuse(head, 415, "type", message)
        if encoding is None:
            shown = encoding_header.decode("latin-1")[:100]
            message = f"content encoding {shown!r} is not supported; use gzip, zstd or deflate"
            return self._refuse(head, 415, "type", message, (b"accept-encoding", b"gzip, zstd"))
        if caller is None:
            caller = claimed_tenant(tenant_header)
        if isinstance(caller, Denied):
            return self._refuse(head, caller.status, "tenant", caller.message)
        tenant = caller
        if tenant in self._closed_tenants:
            denied = closed_tenant(tenant)
            return self._refuse(head, denied.status, "tenant", denied.message)
        head = Head(tenant, kind, encoding, length)
        if length is not None and length > self._max_body:
            return self.too_large(head)
        if self._closed is not None:
            reason, message = self._closed
            return self._refuse(head, 503, reason, message, self._retry_after(self._retry_max))
        wait = self._quotas.admit(tenant, 0)
        if wait is not None:
            return self._over_quota(head, wait)
        if self._backlogged(tenant):
            return self._over_backlog(head)
        if not self._has_capacity(tenant):
            return self._overloaded(head, "overloaded")
        return head

    def _has_capacity(self, tenant: str) -> bool:
        """Whether the tenant's share of the queue is not used up and few requests wait for it."""
        fill = self._queue.fill
        if self._spans.total > _MOST_WAITING * self._spans.capacity:
            return False
        return fill < 1 and self._spans.admits(tenant, 0, int(fill * self._spans.capacity))

    @property
    def buffered_bytes(self) -> int:
        """Bytes of bodies in memory, including bodies that are still arriving."""
        return self._bytes.total

    def body(self, head: Head) -> Body:
        """Collects the body of an admitted request; use it as a context manager."""
        return Body(self, head)

    async def handle(self, head: Head, body: bytes | memoryview) -> HttpResponse:
        """Queue an admitted request and answer it. Never raises because of a client, a store or the
        load."""
        with trio.move_on_after(self.answer_timeout):
            return await self.process(head, body)
        return self.unanswered(head, len(body))

    async def process(self, head: Head, body: bytes | memoryview) -> HttpResponse:
        """:meth:`handle` without its time limit, for a listener that itself cancels this call after
        ``answer_timeout`` seconds and then answers :meth:`unanswered`: a cancel scope per request
        is a tenth of the cost of a small request."""
        weight = self.estimate(head, len(body))
        wait = self._quotas.admit(head.tenant, weight)
        if wait is not None:
            return self._over_quota(head, wait)
        if not self._has_capacity(head.tenant):  # others may have arrived with the body
            self._quotas.settle(head.tenant, -weight)
            return self._overloaded(head, "overloaded", weight)
        reply = Reply()
        self._spans.take(head.tenant, weight)
        request = Request(
            head.tenant,
            head.content_type,
            head.encoding,
            body,
            self._clock_ns(),
            weight,
            reply,
            self._give_back_spans,
        )
        if not await self._enqueue(request):
            self._quotas.settle(head.tenant, -weight)
            return self._overloaded(head, "overloaded", weight)
        self._refusals *= _MEMORY
        return self._answer(head, len(body), weight, await reply.wait())

    async def _enqueue(self, request: Request) -> bool:
        queued = False
        try:
            try:
                self._queue.send_nowait(request)
                queued = True
            except trio.WouldBlock:
                queued = await self._queue.offer(request, self._offer_timeout)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            self.drain()
        finally:
            if not queued:
                request.release()
        return queued

    def unanswered(self, head: Head, size: int) -> HttpResponse:
        """The answer if the outcome of a request of ``size`` bytes is not known in time."""
        message = "the spans were received but are not written yet; send them again"
        retry = self._retry_after(self._retry_max)
        spans = self.estimate(head, size)
        return self._refuse(head, 503, "unavailable", message, retry, spans=spans)

    def _answer(self, head: Head, size: int, weight: int, outcome: Done | Refused) -> HttpResponse:
        if isinstance(outcome, Refused):
            if outcome.status not in (400, 413):  # these were decoded: their cost counts
                self._quotas.settle(head.tenant, -weight)
            reason = {400: "undecodable", 403: "tenant", 413: "too_large"}.get(
                outcome.status, "unavailable"
            )
            retry = [self._retry_after(self._retry_max)] if outcome.status == 503 else []
            return self._refuse(head, outcome.status, reason, outcome.message, *retry, spans=weight)
        self.accepted_requests += 1
        self._quotas.settle(head.tenant, outcome.spans + outcome.rejected - weight)
        if outcome.spans:
            self._learn(head, size, outcome.spans)
        if outcome.rejected:
            return self._accepted(head.content_type, outcome)
        return self._complete[head.content_type]

    @staticmethod
    def _accepted(kind: str, outcome: Done) -> HttpResponse:
        body = export_response(kind == JSON, outcome.rejected, outcome.message)
        return respond(200, body, MEDIA_TYPES[kind])

    # Weights.

    def estimate(self, head: Head, size: int) -> int:
        """The estimated number of spans in a body of ``size`` bytes, at least 1."""
        known = self._seen.get((head.tenant, head.content_type, head.encoding))
        if known is None:
            return int(size / self._bytes_per_span[head.content_type, head.encoding]) or 1
        total, count = known
        return int(size * min(count / total, 1.0)) or 1

    def _learn(self, head: Head, size: int, spans: int) -> None:
        key = head.tenant, head.content_type, head.encoding
        known = self._seen.get(key)
        if known is None:
            if len(self._seen) >= _MOST_ESTIMATES:
                del self._seen[next(iter(self._seen))]
            known = self._bytes_per_span[head.content_type, head.encoding], 1.0
        total, count = known
        self._seen[key] = (total * _MEMORY + size, count * _MEMORY + spans)

    # Refusals.

    def too_large(self, head: Head) -> HttpResponse:
        """The answer to a body above the limit."""
        message = (
            f"the body is larger than {self._max_body} bytes; send fewer spans in a request "
            "(or raise ingest.max_body_bytes)"
        )
        return self._refuse(head, 413, "too_large", message)

    def slow_body(self, head: Head) -> HttpResponse:
        """The answer if the body does not arrive in time."""
        reason = "slow_body"
        message = "the body did not arrive in time; send it again, in smaller requests"
        if self._closed is not None and self.state == "draining":
            reason, message = self._closed
        retry = self._retry_after(self._retry_min)
        return self._refuse(head, 503, reason, message, retry, (b"connection", b"close"))

    def slow_head(self) -> HttpResponse:
        """The answer if the headers do not arrive in time."""
        message = "the headers did not arrive in time; send them again"
        return self._refuse(_UNKNOWN, 408, "slow_head", message, spans=0)

    def malformed(self, status: int, message: str) -> HttpResponse:
        """The answer to an invalid HTTP request; ``status`` is 400, 431 or 505."""
        return self._refuse(_UNKNOWN, status, "malformed", message, spans=0)

    def no_memory(self, head: Head) -> HttpResponse:
        """The answer if too many bodies are in memory."""
        return self._overloaded(head, "memory")

    def _over_quota(self, head: Head, wait: float) -> HttpResponse:
        seconds = min(max(math.ceil(wait), self._retry_min), self._retry_max)
        rate = self._quotas.rate(head.tenant)
        message = (
            f"tenant {head.tenant} exceeds its quota of {rate} spans per second; "
            "send less, or ask for a larger quota"
        )
        return self._refuse(head, 429, "quota", message, self._retry_after(seconds))

    def _over_backlog(self, head: Head) -> HttpResponse:
        message = (
            f"spans of tenant {head.tenant} wait to be evaluated, because its rules need more "
            "processor time than its share; send them again later, or make the rules cheaper"
        )
        return self._refuse(head, 429, "backlog", message, self._retry_after(self._retry_min))

    def _overloaded(self, head: Head, reason: str, spans: int | None = None) -> HttpResponse:
        """The larger the fraction of refused requests, the longer clients are asked to wait."""
        self._refusals = self._refusals * _MEMORY + (1 - _MEMORY)
        span = self._retry_max - self._retry_min
        retry = self._retry_after(self._retry_min + round(span * self._refusals))
        message = "the service is overloaded; send the spans again later"
        if self._closed is not None:
            reason, message = self._closed
        return self._refuse(head, 503, reason, message, retry, spans=spans)

    @staticmethod
    def _retry_after(seconds: int) -> tuple[bytes, bytes]:
        return (b"retry-after", b"%d" % seconds)

    def _refuse(
        self,
        head: Head,
        status: int,
        reason: str,
        message: str,
        *extra: tuple[bytes, bytes],
        spans: int | None = None,
    ) -> HttpResponse:
        if spans is None:
            spans = self.estimate(head, head.length or 0)
        self.refused_requests[reason] += 1
        self.refused_spans[reason] += spans
        return export_error(status, head.content_type, message, *extra, reason=reason)


class Body:
    """Collects the body of one request, within the limits for one body and for all together."""

    __slots__ = ("_chunks", "_edge", "_head", "_reserved", "_size")

    def __init__(self, edge: Edge, head: Head) -> None:
        self._edge = edge
        self._head = head
        self._chunks: list[bytes] = []
        self._size = 0
        self._reserved = 0

    def __enter__(self) -> Self:
        self._edge._requests += 1
        return self

    def __exit__(self, *_: object) -> None:
        if self._reserved:
            self._edge._bytes.give_back(self._head.tenant, self._reserved)
            self._reserved = 0
        self._chunks.clear()
        self._edge._requests -= 1
        if self._edge._settled is not None and not self._edge._requests:
            self._edge._settled.set()

    def feed(self, chunk: bytes) -> HttpResponse | None:
        """Add the next part; returns the response that refuses the request, or None."""
        self._size += len(chunk)
        refusal = self.reserve(self._size)
        if refusal is None:
            self._chunks.append(chunk)
        return refusal

    def reserve(self, size: int) -> HttpResponse | None:
        """Claim memory for ``size`` bytes in total; returns the response that refuses the request,
        or None. For a listener that keeps the parts itself. Memory is claimed for bytes that have
        arrived, not for announced ones, so that a client that announces much and sends little does
        not keep others out."""
        edge = self._edge
        if size > edge._max_body:
            return edge.too_large(self._head)
        claim = size - self._reserved
        if claim > 0:
            if not edge._bytes.admits(self._head.tenant, claim):
                return edge.no_memory(self._head)
            edge._bytes.take(self._head.tenant, claim)
            self._reserved += claim
        return None

    def take(self) -> bytes:
        """The whole body. Its memory stays reserved until the context ends."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)


@lru_cache(maxsize=256)
def _content_type(header: bytes) -> str | None:
    media_type = header.partition(b";")[0].strip().lower()
    if media_type in (b"application/x-protobuf", b"application/protobuf"):
        return PROTOBUF
    if media_type == b"application/json":
        return JSON
    return None


@lru_cache(maxsize=256)
def _encoding(header: bytes) -> str | None:
    return ENCODINGS.get(header.decode("latin-1").strip().lower())
