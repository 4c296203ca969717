"""Batches that wait because their tenants used up their CPU time.

A fold gives each tenant a slice of CPU time. What does not fit waits here and is folded in further
slices, in turn (deficit round robin: Shreedhar and Varghese, 1995; a tenant that exceeds its slice
by a costly step pays with its next ones). Batches of other tenants pass by. The span log contains
what waits, and its frames stay pending in :class:`~betrace.service.pipeline.progress.LogProgress`,
so a restart reads it again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from betrace.service.otlp.columns import SpanBatch

SLICE_SECONDS: Final = 0.02
"""CPU seconds of a waiting tenant in one turn."""
MOST_SPANS: Final = 20_000
"""Spans that may wait, in equal shares of the tenants that wait. A tenant that has its share is
asked to send later."""
MOST_BYTES: Final = 64 * 1024 * 1024
"""The same for the bytes of waiting batches."""
_LEAST_SPANS = 1000
_LEAST_BYTES = 1024 * 1024


@dataclass(slots=True, eq=False)
class _Line:
    """The waiting batches of a tenant, in the order of their arrival."""

    batches: deque[SpanBatch] = field(default_factory=deque)
    spans: int = 0
    nbytes: int = 0
    credit: float = 0.0
    """CPU seconds that the tenant may use in its turn; negative if it used too much."""
    since: float = field(default_factory=time.monotonic)
    attempts: int = 0
    """Failed folds of the first batch."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a tenant's line contains, since when it exists (seconds), and CPU seconds used."""

    spans: int
    nbytes: int
    seconds: float
    cpu_seconds: float


class Backlog:
    """The lines of all tenants. Guarded by the lock of the stage, except for what
    :meth:`full` and :meth:`shown` read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._turns: deque[str] = deque()
        self._cpu: dict[str, float] = {}
        self.spans = 0
        """Spans of waiting batches, including what is already folded of them."""
        self.nbytes = 0
        """Bytes of waiting batches."""
        self.cpu_seconds = 0.0
        """CPU seconds of slices since the start."""
        self.slices = 0
        """Slices since the start."""

    def __len__(self) -> int:
        """How many tenants wait."""
        return len(self._lines)

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._lines

    def full(self, tenant: str) -> bool:
        """Whether the tenant should send later: its line has its share of what may wait."""
        line = self._lines.get(tenant)
        if line is None:
            return False
        tenants = len(self._lines) or 1
        return line.spans >= max(MOST_SPANS // tenants, _LEAST_SPANS) or line.nbytes >= max(
            MOST_BYTES // tenants, _LEAST_BYTES
        )

    def shown(self) -> dict[str, Waiting]:
        """What waits, by tenant."""
        now = self._clock()
        return {
            tenant: Waiting(line.spans, line.nbytes, now - line.since, self._cpu.get(tenant, 0.0))
            for tenant, line in self._lines.copy().items()
        }

    def batches(self, tenant: str) -> list[SpanBatch]:
        """The waiting batches of a tenant."""
        line = self._lines.get(tenant)
        return [] if line is None else list(line.batches)

    def add(self, batch: SpanBatch) -> None:
        """Put a batch at the end of its tenant's line."""
        tenant, size = batch.tenant, batch.buf.nbytes
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(since=self._clock())
            self._turns.append(tenant)
        line.batches.append(batch)
        line.spans += len(batch)
        line.nbytes += size
        self.spans += len(batch)
        self.nbytes += size

    def next(self) -> tuple[SpanBatch, float] | None:
        """The batch whose turn it is, and its CPU seconds. The tenant then goes to the end."""
        while self._turns:
            tenant = self._turns.popleft()
            line = self._lines[tenant]
            self._turns.append(tenant)
            line.credit = min(line.credit + SLICE_SECONDS, SLICE_SECONDS)
            if line.credit > 0:
                return line.batches[0], line.credit
        return None

    def used(self, tenant: str, seconds: float) -> None:
        """Note the CPU seconds of a slice."""
        self.slices += 1
        self.cpu_seconds += seconds
        if tenant in self._lines:
            self._lines[tenant].credit -= seconds
            self._cpu[tenant] = self._cpu.get(tenant, 0.0) + seconds

    def failed(self, batch: SpanBatch) -> int:
        """Note that folding a batch failed; returns how often it has."""
        line = self._lines[batch.tenant]
        line.attempts += 1
        return line.attempts

    def done(self, batch: SpanBatch) -> bool:
        """Remove a batch; returns whether it was the last of its tenant."""
        line = self._lines.get(batch.tenant)
        if line is None or not line.batches or line.batches[0] is not batch:
            return False  # the tenant was forgotten meanwhile
        line.batches.popleft()
        line.attempts = 0
        line.spans -= len(batch)
        line.nbytes -= batch.buf.nbytes
        self.spans -= len(batch)
        self.nbytes -= batch.buf.nbytes
        if line.batches:
            return False
        self._leave(batch.tenant)
        return True

    def forget(self, tenant: str) -> int:
        """Drop everything of a tenant; returns its spans."""
        line = self._lines.get(tenant)
        if line is None:
            return 0
        self.spans -= line.spans
        self.nbytes -= line.nbytes
        self._leave(tenant)
        return line.spans

    def _leave(self, tenant: str) -> None:
        del self._lines[tenant]
        self._turns.remove(tenant)
        self._cpu.pop(tenant, None)
