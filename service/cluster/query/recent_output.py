"""The latest signals of each partition's ``OUT`` stream, in memory.

The feed has read and decoded them already. So exports and alerts, which follow the same streams at
their own pace, need not do it again unless they are far behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from betrace.service.signals import Signal
from betrace.service.storage.signal_queues import QueuePage

MOST_SIGNALS = 20_000
"""Of all partitions. A signal takes about 2 kB."""


@dataclass(slots=True)
class _Partition:
    """All messages after sequence ``after`` up to ``upto`` are known: these have signals."""

    after: int
    upto: int
    messages: deque[tuple[int, Sequence[Signal]]] = field(default_factory=deque)
    signals: int = 0


class RecentOutput:
    """The latest signals. May be called from any thread. Nothing is kept unless it is ``used``."""

    def __init__(self, partitions: int, most: int = MOST_SIGNALS) -> None:
        self.used = False
        self._most = max(1, most // partitions)
        self._lock = threading.Lock()
        self._partitions: dict[int, _Partition] = {}

    def add(self, partition: int, sequence: int, signals: Sequence[Signal]) -> None:
        """Note the signals of a message. Messages come in order; after a jump, for
        example when the stream is read from its beginning again, earlier ones are forgotten."""
        if not self.used:
            return
        with self._lock:
            known = self._partitions.get(partition)
            if known is None or sequence != known.upto + 1:
                known = self._partitions[partition] = _Partition(sequence - 1, sequence - 1)
            known.upto = sequence
            if not signals:
                return
            known.messages.append((sequence, signals))
            known.signals += len(signals)
            while known.signals > self._most and len(known.messages) > 1:
                known.after, gone = known.messages.popleft()
                known.signals -= len(gone)

    def read(self, partition: int, after: int, limit: int) -> QueuePage | None:
        """The signals of whole messages after a sequence, until there are ``limit`` or more; None
        if they are not in memory."""
        with self._lock:
            known = self._partitions.get(partition)
            if known is None or not known.after <= after <= known.upto:
                return None
            found: list[tuple[int, Signal]] = []
            for sequence, signals in known.messages:
                if sequence <= after:
                    continue
                if len(found) >= limit:
                    return QueuePage(found, found[-1][0], more=True)
                found += [(sequence, signal) for signal in signals]
            return QueuePage(found, known.upto, more=False)
