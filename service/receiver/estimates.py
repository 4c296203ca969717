"""Estimates of the number of spans in a body that is not decoded yet, and of what decoding costs.

The length of the body is divided by the running mean of bytes per span of the same tenant, content
type and encoding. Each answer of the pipeline updates the mean. A request weighs as much as its
spans, or as its decoding, whichever is more.
"""

from __future__ import annotations

from betrace.service.pipeline.scanning import quick_size
from betrace.service.receiver.heads import ENCODINGS, Head
from betrace.service.receiver.responses import JSON, PROTOBUF

# Bytes of a span before the first answer, by content type; compressed bodies are smaller.
_FIRST_GUESS = {PROTOBUF: 400.0, JSON: 900.0}
_COMPRESSION = 7.0
_MOST_ESTIMATES = 10_000  # of tenants, content types and encodings; the oldest is forgotten
_MEMORY = 0.98  # weight of the past: about the last 50 requests count
# Spans that are decoded, written and folded in a second.
_SPANS_A_SECOND = 250_000
_HEAVY = 2500  # spans that gain nothing from being handled with others
_NOTABLE_SECONDS = 0.001  # what takes less is not noted
_COST_MEMORY = 0.9  # weight of the past, per request
_CHEAP = 1e-8  # seconds a byte that need not be remembered


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
        # By the same: the most CPU seconds that decoding a byte took lately.
        self._costs: dict[tuple[str, str, str], float] = {}

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

    def weight(self, head: Head, size: int) -> int:
        """The weight of a body of ``size`` bytes: its estimated number of spans, or more if
        decoding it takes longer than that of so many spans."""
        spans = self.estimate(head, size)
        if not self._costs:
            return spans
        seconds = size * self._costs.get((head.tenant, head.content_type, head.encoding), 0.0)
        return max(spans, int(seconds * _SPANS_A_SECOND))

    def is_heavy(self, head: Head, body: bytes | memoryview, weight: int) -> bool:
        """Whether decoding a body of this weight may take so long, or give so many spans, that
        other requests must not wait for it."""
        return weight > _HEAVY or not quick_size(head.content_type, head.encoding, body)

    def learn_cost(self, head: Head, size: int, seconds: float) -> None:
        """Note that decoding a body of ``size`` bytes took so many CPU seconds."""
        key = head.tenant, head.content_type, head.encoding
        known = self._costs.get(key)
        if known is None:
            if seconds < _NOTABLE_SECONDS:
                return
            if len(self._costs) >= _MOST_ESTIMATES:
                del self._costs[next(iter(self._costs))]
            known = 0.0
        cost = max(seconds / max(size, 1), known * _COST_MEMORY)
        if cost < _CHEAP:
            self._costs.pop(key, None)
        else:
            self._costs[key] = cost

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
