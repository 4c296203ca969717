"""Estimates of the number of spans in a body that is not decoded yet: the weight of a request.

The length of the body is divided by the running mean of bytes per span of the same tenant, content
type and encoding. Each answer of the pipeline updates the mean.
"""

from __future__ import annotations

from betrace.service.receiver.heads import ENCODINGS, Head
from betrace.service.receiver.responses import JSON, PROTOBUF

# Bytes of a span before the first answer, by content type; compressed bodies are smaller.
_FIRST_GUESS = {PROTOBUF: 400.0, JSON: 900.0}
_COMPRESSION = 7.0
_MOST_ESTIMATES = 10_000  # of tenants, content types and encodings; the oldest is forgotten
_MEMORY = 0.98  # weight of the past: about the last 50 requests count


class SpanEstimates:
    """The running means of bytes per span."""

    def __init__(self) -> None:
        self._bytes_per_span = {
            (kind, encoding): size / (_COMPRESSION if encoding else 1)
            for kind, size in _FIRST_GUESS.items()
            for encoding in ENCODINGS.values()
        }
        # By tenant, content type and encoding: bytes and spans, recent ones counting more.
        self._seen: dict[tuple[str, str, str], tuple[float, float]] = {}

    def __len__(self) -> int:
        """How many means are known."""
        return len(self._seen)

    def estimate(self, head: Head, size: int) -> int:
        """The estimated number of spans in a body of ``size`` bytes, at least 1."""
        known = self._seen.get((head.tenant, head.content_type, head.encoding))
        if known is None:
            return int(size / self._bytes_per_span[head.content_type, head.encoding]) or 1
        total, count = known
        return int(size * min(count / total, 1.0)) or 1

    def learn(self, head: Head, size: int, spans: int) -> None:
        """Note that a body of ``size`` bytes had ``spans`` spans."""
        key = head.tenant, head.content_type, head.encoding
        known = self._seen.get(key)
        if known is None:
            if len(self._seen) >= _MOST_ESTIMATES:
                del self._seen[next(iter(self._seen))]
            known = self._bytes_per_span[head.content_type, head.encoding], 1.0
        total, count = known
        self._seen[key] = (total * _MEMORY + size, count * _MEMORY + spans)
