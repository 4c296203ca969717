"""Traces that are due for a decision: copies of their state, independent of the open traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.rules.compile import CompiledRules
from betrace.service.traces.layout import FLAGS as SLOT_FLAGS
from betrace.service.traces.layout import (
    HI,
    LO,
    ROOT_NAME_LEN,
    ROOT_SERVICE,
    ROOTED,
    SERVICES_1,
    SERVICES_2,
)
from betrace.service.traces.signal_history import SignalHistory

MOST_SERVICE = 200  # characters of a service's name in a signal


@dataclass(frozen=True, slots=True)
class Context:
    """The last window of a long trace: its number and the number of its first span, both from 1,
    and the ids of its spans in order of arrival."""

    window: int
    first: int
    spans: tuple[int, ...]


@dataclass(slots=True, eq=False)
class DueTraces:
    """Traces of one tenant that are to be decided by ``rules``.

    ``rows`` are slot rows (:mod:`betrace.service.traces.layout`), ``names`` their root names, and
    ``entries[starts[k]:starts[k + 1]]`` the matches of trace ``k``. If ``closed`` is false, the
    traces are still open and only breaches that no later span can undo may be decided.
    ``services`` maps the service numbers in the rows to names. ``spilled`` are the log positions of
    traces with more frames than a slot holds: rows (hi, lo, positions). ``contexts`` and
    ``signal_history`` are by trace number ``k``: the last window of each long trace, and the
    signals of each trace that was closed before. Active signals that no longer hold are retracted.
    """

    tenant: str
    rules: CompiledRules
    closed: bool
    rows: Rows
    names: Bytes
    entries: Rows
    starts: Rows
    services: Sequence[str]
    spilled: Rows | None = None
    contexts: dict[int, Context] = field(default_factory=dict)
    signal_history: dict[int, SignalHistory] = field(default_factory=dict)
    received_ns: int = 0
    spans: int = 0
    ticket: int = 0
    """Of :class:`betrace.service.pipeline.progress.InFlight`."""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> DueTraces:
        """Traces ``first`` to before ``last``, without what was spilled."""
        start, end = self.starts[first], self.starts[last]
        of = range(first, last)
        return replace(
            self,
            rows=self.rows[first:last],
            names=self.names[first:last],
            entries=self.entries[start:end],
            starts=self.starts[first : last + 1] - start,
            spilled=None,
            contexts={k - first: self.contexts[k] for k in of if k in self.contexts},
            signal_history={
                k - first: self.signal_history[k] for k in of if k in self.signal_history
            },
        )

    def trace_id(self, k: int) -> str:
        """The trace id of trace ``k``, 32 hex digits."""
        return f"{int(self.rows[k, HI]) & _MASK:016x}{int(self.rows[k, LO]) & _MASK:016x}"

    def trace_ids(self) -> Bytes:
        """The trace ids as bytes, shape (traces, 16)."""
        big_endian = np.ascontiguousarray(self.rows[:, [HI, LO]]).astype(">i8")
        return big_endian.view(np.uint8).reshape(-1, 16)

    def root_name(self, k: int) -> str | None:
        """The name of the root span (cut at 96 bytes); None if no root span was seen."""
        if not self.rows[k, SLOT_FLAGS] & ROOTED:
            return None
        raw = self.names[k, : self.rows[k, ROOT_NAME_LEN]].tobytes()
        return raw.decode(errors="ignore")

    def service(self, k: int) -> str:
        """The service of the root span of trace ``k`` or, if no root span was seen, of its first
        span (cut at 200 characters); empty without one."""
        row = self.rows[k]
        number = int(row[ROOT_SERVICE] if row[SLOT_FLAGS] & ROOTED else row[SERVICES_1] & 0xFFFF)
        return self.services[number][:MOST_SERVICE] if number else ""

    def service_names(self, k: int) -> list[str]:
        """The services of trace ``k``, up to eight, in order of appearance."""
        numbers = [
            int(self.rows[k, column]) >> shift & 0xFFFF
            for column in (SERVICES_1, SERVICES_2)
            for shift in (0, 16, 32, 48)
        ]
        return [self.services[number] for number in numbers if number]


_MASK = 2**64 - 1
