"""Traces that are due: copies of their state, apart from the open traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.rules.compile import CompiledRules
from betrace.service.traces.layout import FLAGS as SLOT_FLAGS
from betrace.service.traces.layout import HI, LO, ROOT_NAME_LEN, ROOTED, SERVICES_1, SERVICES_2
from betrace.service.traces.signal_history import Told


@dataclass(frozen=True, slots=True)
class Context:
    """The last window of a long trace: its number and its first span, both from 1, and the ids of
    its spans in the order of their arrival."""

    window: int
    first: int
    spans: tuple[int, ...]


@dataclass(slots=True, eq=False)
class DueTraces:
    """Traces of one tenant that are to be decided by ``rules``.

    ``rows`` are slot rows (:mod:`betrace.service.traces.layout`), ``names`` the root names beside
    them, and
    ``entries[starts[k]:starts[k + 1]]`` the matches of trace ``k``. Where ``closed`` is false,
    the traces go on and only what no later span can undo may be decided. ``told`` is, by number,
    what was said of traces that had been closed earlier: what stands and no longer holds is
    retracted. ``services`` names the service numbers in the rows; ``spilled`` are log positions of
    traces too long to hold them all (hi, lo, positions); ``contexts`` the last window of each long
    trace, by its number here.
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
    told: dict[int, Told] = field(default_factory=dict)
    received_ns: int = 0
    spans: int = 0
    ticket: int = 0
    """Of :class:`betrace.service.pipeline.progress.InFlight`."""

    def __len__(self) -> int:
        return len(self.rows)

    def trace_id(self, k: int) -> str:
        """The trace id of trace ``k``, 32 hex digits."""
        return f"{int(self.rows[k, HI]) & _MASK:016x}{int(self.rows[k, LO]) & _MASK:016x}"

    def trace_ids(self) -> Bytes:
        """The trace ids as bytes, shape (traces, 16)."""
        big_endian = np.ascontiguousarray(self.rows[:, [HI, LO]]).astype(">i8")
        return big_endian.view(np.uint8).reshape(-1, 16)

    def root_name(self, k: int) -> str | None:
        """The name of the root span (cut at 96 bytes), None where no root was seen."""
        if not self.rows[k, SLOT_FLAGS] & ROOTED:
            return None
        raw = self.names[k, : self.rows[k, ROOT_NAME_LEN]].tobytes()
        return raw.decode(errors="ignore")

    def service_names(self, k: int) -> list[str]:
        """The services of trace ``k``, up to eight, in the order of their appearance."""
        numbers = [
            int(self.rows[k, column]) >> shift & 0xFFFF
            for column in (SERVICES_1, SERVICES_2)
            for shift in (0, 16, 32, 48)
        ]
        return [self.services[number] for number in numbers if number]


_MASK = 2**64 - 1
