"""Admission of requests: what happens to a request before and after the pipeline, without any
framework (OTLP/HTTP 1.x: opentelemetry-proto, docs/specification.md).

A listener calls, for each request::

    head = await admission.admit(method, path, headers)  # or the HttpResponse that refuses it
    with admission.body(head) as body:                   # limits apply while the body arrives
        refusal = body.feed(chunk)                       # None, or the HttpResponse that refuses it
        response = await admission.handle(head, body.take())

A listener that keeps the body itself calls ``body.reserve(size)`` instead of ``feed`` and passes
its own bytes to ``handle``.

Everything here runs on the Trio thread for each request, so it is limited to dictionary lookups. If
a client disconnects while its request is queued, its spans are still accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Final

import trio

from betrace.channels import SendChannel
from betrace.service.config.edge import Ingest
from betrace.service.otlp.response import export_response
from betrace.service.pipeline.request import Done, Refused, Reply, Request
from betrace.service.pipeline.scanning import SMALL_BYTES
from betrace.service.receiver.bodies import Bodies, Body
from betrace.service.receiver.estimates import SpanEstimates
from betrace.service.receiver.heads import PATHS, Head, content_encoding, content_type
from betrace.service.receiver.refusals import FADING, Refusals
from betrace.service.receiver.responses import JSON, MEDIA_TYPES, Headers, HttpResponse, respond
from betrace.service.receiver.shares import Shares
from betrace.service.tenancy.authentication import (
    Authenticator,
    Denied,
    claimed_tenant,
    closed_tenant,
)
from betrace.service.tenancy.quotas import SpanQuotas
from betrace.service.tenancy.tenant_limit import TenantLimit
from betrace.service.tenants import DEFAULT_TENANT

# Limit of the spans that are queued or wait to be queued, as a multiple of the capacity. Waiting in
# vain costs more than everything else done for a request: hundreds of such requests took most of
# Trio's thread.
_MOST_WAITING = 1.1


@dataclass(frozen=True, slots=True)
class TenantStates:
    """What is known of tenants before their spans are admitted."""

    closed: Container[str] = frozenset()
    """Deleted tenants."""
    backlogged: Callable[[str], bool] = lambda tenant: False
    """Whether a tenant must wait because too many of its spans wait to be folded."""
    limit: TenantLimit | None = None
    """Bounds the tenants that anyone may name."""
    set_aside: Callable[[Request], object] | None = None
    """Takes requests that are expected to take long, in place of the queue."""


class Admission:
    """Admits requests, queues them and answers them.

    ``capacity`` is that of the queue, in spans. Under load, tenants share the queue and the memory
    for bodies (:mod:`betrace.service.receiver.shares`).
    """

    def __init__(
        self,
        settings: Ingest,
        queue: SendChannel[Request],
        quotas: SpanQuotas,
        authenticator: Authenticator | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        capacity: int = 10_000,
        tenants: TenantStates | None = None,
    ) -> None:
        tenants = tenants or TenantStates()
        self._tenant_limit = tenants.limit
        self._closed_tenants = tenants.closed
        self._backlogged = tenants.backlogged
        self._set_aside = tenants.set_aside
        self._spans = Shares(capacity, settings.refuse_above)
        self._release_spans = self._spans.release
        self._queue = queue
        self._quotas = quotas
        self._authenticator = authenticator
        self._clock_ns = clock_ns
        self._max_body: Final = settings.max_body_bytes
        self._offer_timeout: Final = settings.offer_timeout_ms / 1000
        self.answer_timeout: Final = settings.answer_timeout_seconds
        self.estimates = SpanEstimates()
        self.refusals = Refusals(settings, self.estimates.estimate)
        self._bodies = Bodies(settings, self.refusals)
        self._complete = {kind: _accepted(kind, Done(0)) for kind in MEDIA_TYPES}
        self.accepted_requests = 0

    # Opening and closing.

    @property
    def state(self) -> str:
        """``open``, ``paused``, ``draining`` or ``unavailable``."""
        return "open" if self.refusals.closed is None else self.refusals.closed[0]

    def pause(self) -> None:
        """Refuse new requests until :meth:`resume`. Does nothing while draining."""
        if self.state != "draining":
            message = "ingestion is paused by an operator; send the spans again later"
            self.refusals.closed = ("paused", message)

    def resume(self) -> None:
        """Accept requests again after :meth:`pause`. Does nothing while draining."""
        if self.state == "paused":
            self.refusals.closed = None

    def block(self, message: str) -> None:
        """Refuse new requests until :meth:`unblock`, because they could not be kept."""
        if self.state != "draining":
            self.refusals.closed = ("unavailable", message)

    def unblock(self) -> None:
        """Accept requests again after :meth:`block`."""
        if self.state == "unavailable":
            self.refusals.closed = None

    def drain(self) -> None:
        """Refuse new requests for good, because the service stops."""
        self.refusals.closed = ("draining", "the service is shutting down; send the spans again")

    @property
    def unanswered(self) -> int:
        """Requests that are admitted and not answered."""
        return self._bodies.requests

    async def settled(self) -> None:
        """Return when every admitted request is answered, or its client is gone."""
        await self._bodies.settled()

    # The head of a request.

    async def admit(self, method: str, path: str, headers: Headers) -> Head | HttpResponse:
        """Check everything that can be checked before the body is read. Names of headers are lower
        case."""
        if self._authenticator is None:
            return self._check(method, path, headers, None)
        authorization = _authorization(headers)
        caller: str | Denied | None = None
        if authorization is not None:
            caller = self._authenticator.remembered(authorization)
        if caller is None:
            caller = await self._authenticator.tenant(authorization)
        return self._check(method, path, headers, caller)

    def admit_again(self, head: Head, headers: Headers) -> Head | HttpResponse | None:
        """:meth:`admit` for a request whose headers, apart from its length, are those of an
        admitted one. None if all must be checked again, because the token must be."""
        if self._authenticator is not None:
            authorization = _authorization(headers)
            if authorization is None:
                return None
            if self._authenticator.remembered(authorization) != head.tenant:
                return None
        if head.tenant in self._closed_tenants:
            return self.refusals.wrong_tenant(head, closed_tenant(head.tenant))
        return self._check_load(head)

    def _check(
        self, method: str, path: str, headers: Headers, caller: str | Denied | None
    ) -> Head | HttpResponse:
        """``caller`` is the tenant of the token; None without authentication."""
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
                tenant_header = joined(tenant_header, value)
        kind = content_type(type_header)
        encoding = content_encoding(encoding_header)
        length = int(length_header) if length_header and length_header.isdigit() else None
        head = Head(DEFAULT_TENANT, kind or JSON, encoding or "", length)
        refusals = self.refusals
        if path not in PATHS:
            return refusals.wrong_path(head, path)
        if method != "POST":
            return refusals.wrong_method(head, method)
        if isinstance(caller, Denied):
            return refusals.unauthenticated(head, caller)
        if kind is None:
            return refusals.wrong_type(head, type_header)
        if encoding is None:
            return refusals.wrong_encoding(head, encoding_header)
        tenant = claimed_tenant(tenant_header) if caller is None else caller
        if isinstance(tenant, Denied):
            return refusals.wrong_tenant(head, tenant)
        if tenant in self._closed_tenants:
            return refusals.wrong_tenant(head, closed_tenant(tenant))
        if self._tenant_limit is not None and (one_more := self._tenant_limit.refusal(tenant)):
            return refusals.wrong_tenant(head, one_more)
        return self._check_load(Head(tenant, kind, encoding, length))

    def _check_load(self, head: Head) -> Head | HttpResponse:
        """Whether the body may be read now."""
        refusals, tenant = self.refusals, head.tenant
        if head.length is not None and head.length > self._max_body:
            return refusals.too_large(head)
        if refusals.closed is not None:
            return refusals.closed_now(head)
        wait = self._quotas.admit(tenant, 0)
        if wait is not None:
            return refusals.over_quota(head, wait, self._quotas.rate(tenant))
        if self._backlogged(tenant):
            return refusals.over_backlog(head)
        if not self._has_capacity(tenant):
            return refusals.overloaded(head)
        return head

    def _has_capacity(self, tenant: str) -> bool:
        """Whether the tenant's share of the queue is not used up and few requests wait for it."""
        fill = self._queue.fill
        if self._spans.total > _MOST_WAITING * self._spans.capacity:
            return False
        return fill < 1 and self._spans.admits(tenant, 0, int(fill * self._spans.capacity))

    # Its body.

    @property
    def buffered_bytes(self) -> int:
        """Bytes of bodies in memory, including bodies that are still arriving."""
        return self._bodies.shares.total

    def body(self, head: Head) -> Body:
        """Collects the body of an admitted request; use it as a context manager."""
        return Body(self._bodies, head)

    # Its way through the pipeline.

    async def handle(self, head: Head, body: bytes | memoryview) -> HttpResponse:
        """Queue an admitted request and answer it. Never raises because of a client, a store or the
        load."""
        with trio.move_on_after(self.answer_timeout):
            return await self.process(head, body)
        return self.refusals.unanswered(head, len(body))

    async def process(self, head: Head, body: bytes | memoryview) -> HttpResponse:
        """:meth:`handle` without its time limit, for a listener that itself cancels this call after
        ``answer_timeout`` seconds and then answers :meth:`Refusals.unanswered`: a cancel scope per
        request is a tenth of the cost of a small request."""
        estimates = self.estimates
        weight = estimates.weight(head, len(body))
        heavy = False
        if (head.encoding or len(body) > SMALL_BYTES) and self._set_aside is not None:
            heavy = estimates.is_heavy(head, body, weight)
            if heavy and self._backlogged(head.tenant):
                return self.refusals.over_backlog(head)
        wait = self._quotas.admit(head.tenant, weight)
        if wait is not None:
            return self.refusals.over_quota(head, wait, self._quotas.rate(head.tenant))
        # Others may have arrived with the body.
        if not heavy and not self._has_capacity(head.tenant):
            self._quotas.settle(head.tenant, -weight)
            return self.refusals.overloaded(head, spans=weight)
        reply = Reply()
        if not heavy:
            self._spans.take(head.tenant, weight)
        request = Request(
            head.tenant,
            head.content_type,
            head.encoding,
            body,
            self._clock_ns(),
            weight,
            reply,
            None if heavy else self._release_spans,
        )
        if heavy:
            assert self._set_aside is not None
            self._set_aside(request)
        elif not await self._enqueue(request):
            self._quotas.settle(head.tenant, -weight)
            return self.refusals.overloaded(head, spans=weight)
        self.refusals.overload *= FADING
        outcome = await reply.wait()
        if request.seconds:
            estimates.learn_cost(head, len(body), request.seconds)
        return self._answer(head, len(body), weight, outcome)

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

    def _answer(self, head: Head, size: int, weight: int, outcome: Done | Refused) -> HttpResponse:
        if isinstance(outcome, Refused):
            if outcome.status not in (400, 413):  # these were decoded: their cost counts
                self._quotas.settle(head.tenant, -weight)
            return self.refusals.failed(head, outcome, weight)
        self.accepted_requests += 1
        self._quotas.settle(head.tenant, outcome.spans + outcome.rejected - weight)
        if outcome.spans:
            self.estimates.learn(head, size, outcome.spans)
        if outcome.rejected:
            return _accepted(head.content_type, outcome)
        return self._complete[head.content_type]


def _authorization(headers: Headers) -> str | None:
    found: str | None = None
    for name, value in headers:
        if name == b"authorization":
            found = joined(found, value)
    return found


def _accepted(kind: str, outcome: Done) -> HttpResponse:
    body = export_response(kind == JSON, outcome.rejected, outcome.message)
    return respond(200, body, MEDIA_TYPES[kind])


def joined(before: str | None, value: bytes) -> str:
    """The value of a header that may be repeated (RFC 9110, 5.3). Two tenants or two tokens give a
    value that is neither."""
    text = value.decode("latin-1")
    return text if before is None else f"{before}, {text}"
