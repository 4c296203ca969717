"""Decodes and scans requests: the beginning of ingestion, in one process and on an edge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.columns import (
    ERROR,
    ERROR_OFF,
    REJECTED_SPAN_ID,
    REJECTED_TRACE_ID,
    SPAN_COUNT,
    SpanBatch,
)
from betrace.service.otlp.encoding import BodyTooLarge
from betrace.service.otlp.wire import ERRORS, SMALLEST_SPAN, TooManySpans, scan_bodies
from betrace.service.pipeline.request import Done, Refused, Request

Outcome = Done | Refused

MOST_SPANS = 100_000
"""Spans in one request. Each takes 160 bytes and some CPU time even if it compresses to nothing."""
SMALL_BYTES = 128 * 1024
"""Uncompressed bytes that are decoded, scanned, and written or split in about 0.2 ms."""
QUICK_BYTES = 2 << 20
"""Decoded bytes of a request that takes a few milliseconds at most; of JSON, half as many."""
QUICK_SPANS = 10_000
"""Spans of such a request."""
_GZIP_TRAILER = 4  # bytes of its decoded size
_GZIP_LEAST = 18


@dataclass(slots=True)
class IngestCounts:
    """What was ingested, in spans unless stated otherwise."""

    requests: int = 0
    """Answered requests."""
    accepted: int = 0
    rejected: int = 0
    """Spans with invalid ids, dropped from accepted requests."""
    unacknowledged: int = 0
    """In the log and passed on, but refused because the disk did not sync. The client sends them
    again, and their ids identify them as repeated."""
    refused_requests: int = 0
    """Requests that could not be decoded, written or synced."""
    bytes: int = 0
    """Size of accepted bodies as received."""

    def answer(self, request: Request, outcome: Outcome) -> None:
        """Answer a request, and count it."""
        request.reply.set(outcome)
        self.requests += 1
        if isinstance(outcome, Done):
            self.accepted += outcome.spans
            self.rejected += outcome.rejected
            self.bytes += len(request.body)
        else:
            self.refused_requests += 1

    def failed(self, request: Request, error: Exception) -> None:
        """Refuse a request because of a bug; the client still has it and may retry."""
        message = f"the request could not be processed ({type(error).__name__}); send it again"
        self.answer(request, Refused(503, message))
        request.release()


class NotQuick(Exception):  # noqa: N818
    """Decoding a request takes longer than other requests should wait."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """Spans of one tenant. Row *i* of the batch's ``bodies`` is of request ``numbers[i]``."""

    batch: SpanBatch
    numbers: list[int]


def are_small(requests: Sequence[Request]) -> bool:
    """Whether decoding, scanning and passing on the requests takes less time than a call in a
    thread."""
    left = SMALL_BYTES
    for request in requests:
        left -= len(request.body)
        if left < 0 or request.encoding:
            return False
    return True


def quick_size(content_type: str, encoding: str, body: bytes | memoryview) -> bool:
    """Whether a body is small enough to be decoded in a few milliseconds, as far as can be told
    without decoding it: what gzip says of the size need not be true."""
    most = QUICK_BYTES if content_type != "json" else QUICK_BYTES // 2
    size = len(body)
    if encoding == "gzip" and size >= _GZIP_LEAST:
        size = int.from_bytes(body[-_GZIP_TRAILER:], "little")
    return size <= most


def scan_requests(
    requests: Sequence[Request], max_body_bytes: int, not_quick: list[int] | None = None
) -> tuple[list[Scanned], list[Outcome]]:
    """Decode and scan requests together. Returns one batch per tenant, and one for each of its
    requests that may have very many spans; and an outcome for each request, which is final if it
    is a refusal. With ``not_quick``, requests that take long are not decoded completely, and have
    no batch; their numbers are added to this list."""
    outcomes: list[Outcome] = [Done(0)] * len(requests)
    most_spans = MOST_SPANS if not_quick is None else QUICK_SPANS
    by_tenant: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        by_tenant.setdefault(request.tenant, []).append(i)
    scanned: list[Scanned] = []
    for tenant, numbers in by_tenant.items():
        decoded: list[int] = []
        bodies: list[bytes | memoryview] = []
        for i in numbers:
            try:
                body = decode(requests[i], max_body_bytes, quick=not_quick is not None)
            except NotQuick:
                assert not_quick is not None
                not_quick.append(i)
                continue
            if isinstance(body, Refused):
                outcomes[i] = body
            elif len(body) > most_spans * SMALLEST_SPAN:
                try:
                    scanned.append(Scanned(scan_bodies(tenant, [body], most_spans), [i]))
                except TooManySpans:
                    if not_quick is not None:
                        not_quick.append(i)
                        continue
                    outcomes[i] = Refused(
                        413,
                        f"The request has more than {MOST_SPANS} spans. Send fewer spans in "
                        "one request (a smaller batch).",
                    )
            elif body:
                decoded.append(i)
                bodies.append(body)
        if bodies:
            scanned.append(Scanned(scan_bodies(tenant, bodies), decoded))
    return scanned, outcomes


def decode(
    request: Request, max_body_bytes: int, quick: bool = False
) -> bytes | memoryview | Refused:
    """The body as protobuf. Raises :exc:`NotQuick` if it must be ``quick`` and would take long."""
    kind, encoding = request.content_type, request.encoding
    most = QUICK_BYTES if kind != "json" else QUICK_BYTES // 2
    limit = min(max_body_bytes, most) if quick else max_body_bytes
    started = time.thread_time() if encoding or kind == "json" else 0.0
    try:
        return protobuf_body(request.body, kind, encoding, limit)
    except BodyTooLarge as error:
        if limit < max_body_bytes:
            raise NotQuick from None
        return Refused(413, str(error))
    except BadBody as error:
        return Refused(400, str(error))
    finally:
        if started:
            request.seconds = time.thread_time() - started


def scanned_outcome(row: Sequence[int], position: int = 0) -> Outcome:
    """The outcome of a request whose spans are stored, given its row of a batch's ``bodies``."""
    error = row[ERROR]
    if error:
        return Refused(400, f"{ERRORS[error]} (seen at byte {row[ERROR_OFF]} of the body)")
    spans = row[SPAN_COUNT]
    bad_trace, bad_span = row[REJECTED_TRACE_ID], row[REJECTED_SPAN_ID]
    reasons = []
    if bad_trace:
        reasons.append(f"{bad_trace} spans have a trace id that is not 16 bytes, or all zeros")
    if bad_span:
        reasons.append(f"{bad_span} spans have a span id that is not 8 bytes, or all zeros")
    return Done(spans, bad_trace + bad_span, "; ".join(reasons), position)
