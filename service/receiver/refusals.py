"""Refusals of requests: their status, message and ``Retry-After``, and how many there were."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from betrace.service.config.edge import Ingest
from betrace.service.pipeline.request import Refused
from betrace.service.receiver.heads import OTHER_SIGNALS, UNKNOWN_HEAD, Head
from betrace.service.receiver.responses import HttpResponse, export_error
from betrace.service.tenancy.authentication import Denied

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
FADING = 0.98
"""Weight of the past in :attr:`Refusals.overload`: about the last 50 requests count."""

OUTAGES_APART_SECONDS = 10.0
"""A failure to store spans counts as a new outage after this long without one."""

_OUTCOMES = {400: "undecodable", 403: "tenant", 413: "too_large"}


class Refusals:
    """Each method returns the answer to a refused request, and counts it.

    ``requests`` and ``spans`` count refusals by reason (``REASONS``); spans are estimated with
    ``estimate(head, body_bytes)``.
    """

    def __init__(self, settings: Ingest, estimate: Callable[[Head, int], int]) -> None:
        self._max_body = settings.max_body_bytes
        self._retry_min = settings.retry_after_min_seconds
        self._retry_max = settings.retry_after_max_seconds
        self._estimate = estimate
        self.requests = dict.fromkeys(REASONS, 0)
        self.spans = dict.fromkeys(REASONS, 0)
        self.closed: tuple[str, str] | None = None
        """The reason and message of refusing every request; None while requests are admitted."""
        self.overload = 0.0
        """Recent fraction of requests that were refused for load."""
        self._outage_since = self._last_failure = -math.inf

    # Requests that are wrong.

    def wrong_path(self, head: Head, path: str) -> HttpResponse:
        """The answer to a path that does not take traces."""
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

    def wrong_method(self, head: Head, method: str) -> HttpResponse:
        """The answer to a method other than POST."""
        message = f"use POST, not {method[:20]}"
        return self._refuse(head, 405, "method", message, (b"allow", b"POST"))

    def unauthenticated(self, head: Head, denied: Denied) -> HttpResponse:
        """The answer to a missing or invalid token, or one that cannot be checked now."""
        challenge = [(b"www-authenticate", b"Bearer")] if denied.status == 401 else []
        if denied.status == 503:
            challenge = [_retry_after(self._retry_max)]
        return self._refuse(head, denied.status, "unauthenticated", denied.message, *challenge)

    def wrong_type(self, head: Head, header: bytes) -> HttpResponse:
        """The answer to an unsupported content type."""
        shown = header.decode("latin-1")[:100]
        message = f"content type {shown!r} is not supported" if shown else "no content type"
        message += "; send application/x-protobuf or application/json"
        return self._refuse(head, 415, "type", message)

    def wrong_encoding(self, head: Head, header: bytes) -> HttpResponse:
        """The answer to an unsupported content encoding."""
        shown = header.decode("latin-1")[:100]
        message = f"content encoding {shown!r} is not supported; use gzip, zstd or deflate"
        return self._refuse(head, 415, "type", message, (b"accept-encoding", b"gzip, zstd"))

    def wrong_tenant(self, head: Head, denied: Denied) -> HttpResponse:
        """The answer to an invalid or deleted tenant."""
        return self._refuse(head, denied.status, "tenant", denied.message)

    def too_large(self, head: Head) -> HttpResponse:
        """The answer to a body above the limit."""
        message = (
            f"the body is larger than {self._max_body} bytes; send fewer spans in a request "
            "(or raise ingest.max_body_bytes)"
        )
        return self._refuse(head, 413, "too_large", message)

    def malformed(self, status: int, message: str) -> HttpResponse:
        """The answer to an invalid HTTP request; ``status`` is 400, 431 or 505."""
        return self._refuse(UNKNOWN_HEAD, status, "malformed", message, spans=0)

    # Requests that are too slow.

    def slow_head(self) -> HttpResponse:
        """The answer if the headers do not arrive in time."""
        message = "the headers did not arrive in time; send them again"
        return self._refuse(UNKNOWN_HEAD, 408, "slow_head", message, spans=0)

    def slow_body(self, head: Head) -> HttpResponse:
        """The answer if the body does not arrive in time."""
        reason = "slow_body"
        message = "the body did not arrive in time; send it again, in smaller requests"
        if self.closed is not None and self.closed[0] == "draining":
            reason, message = self.closed
        retry = _retry_after(self._retry_min)
        return self._refuse(head, 503, reason, message, retry, (b"connection", b"close"))

    # Requests that should be sent again later.

    def closed_now(self, head: Head) -> HttpResponse:
        """The answer to every request while :attr:`closed` is set."""
        assert self.closed is not None
        reason, message = self.closed
        return self._refuse(head, 503, reason, message, _retry_after(self._retry_max))

    def over_quota(self, head: Head, wait: float, rate: int) -> HttpResponse:
        """The answer to a tenant above its quota of ``rate`` spans a second, which has some again
        in ``wait`` seconds."""
        seconds = min(max(math.ceil(wait), self._retry_min), self._retry_max)
        message = (
            f"tenant {head.tenant} exceeds its quota of {rate} spans per second; "
            "send less, or ask for a larger quota"
        )
        return self._refuse(head, 429, "quota", message, _retry_after(seconds))

    def over_backlog(self, head: Head) -> HttpResponse:
        """The answer to a tenant that has its share of the backlog."""
        message = (
            f"spans of tenant {head.tenant} wait, because its requests or its rules need more "
            "processor time than its share; send them again later, in smaller requests, or make "
            "the rules cheaper"
        )
        return self._refuse(head, 429, "backlog", message, _retry_after(self._retry_min))

    def overloaded(
        self, head: Head, reason: str = "overloaded", spans: int | None = None
    ) -> HttpResponse:
        """The answer if the queue, or the memory for bodies (``reason`` memory), is full. The
        larger the fraction of refused requests, the longer clients are asked to wait."""
        self.overload = self.overload * FADING + (1 - FADING)
        span = self._retry_max - self._retry_min
        retry = _retry_after(self._retry_min + round(span * self.overload))
        message = "the service is overloaded; send the spans again later"
        if self.closed is not None:
            reason, message = self.closed
        return self._refuse(head, 503, reason, message, retry, spans=spans)

    def unanswered(self, head: Head, size: int) -> HttpResponse:
        """The answer if the outcome of a request of ``size`` bytes is not known in time."""
        message = "the spans were received but are not written yet; send them again"
        retry = _retry_after(self._retry_max)
        return self._refuse(
            head, 503, "unavailable", message, retry, spans=self._estimate(head, size)
        )

    def failed(self, head: Head, outcome: Refused, spans: int) -> HttpResponse:
        """The answer to a request that the pipeline refused."""
        reason = _OUTCOMES.get(outcome.status, "unavailable")
        retry = [_retry_after(self._outage_seconds())] if outcome.status == 503 else []
        return self._refuse(head, outcome.status, reason, outcome.message, *retry, spans=spans)

    def _outage_seconds(self) -> int:
        """How long clients should wait while spans cannot be stored: about as long as that has
        lasted, because most outages are short."""
        now = trio.current_time()
        if now - self._last_failure > OUTAGES_APART_SECONDS:
            self._outage_since = now
        self._last_failure = now
        return min(max(round(now - self._outage_since), self._retry_min), self._retry_max)

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
            spans = self._estimate(head, head.length or 0)
        self.requests[reason] += 1
        self.spans[reason] += spans
        return export_error(status, head.content_type, message, *extra, reason=reason)


def _retry_after(seconds: int) -> tuple[bytes, bytes]:
    return (b"retry-after", b"%d" % seconds)
