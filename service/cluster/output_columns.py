"""The columns of closed traces in messages of ``OUT_p``.

Only what queries need is included: no matches of rules, and only the names of services that occur.
Values are stored byte by byte of equal significance, because that compresses best.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.signals import Signal
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import (
    ENTRY_COLUMNS,
    ERRORS,
    FIRST_SEEN,
    FLAGS,
    HI,
    LAST_SEEN,
    LO,
    MAX_END,
    MIN_START,
    NAME_BYTES,
    POSITION_0,
    POSITION_COUNT,
    POSITIONS,
    ROOT_NAME_LEN,
    ROOT_SERVICE,
    SERVICES_1,
    SERVICES_2,
    SLOT_COLUMNS,
    SPANS,
)
from betrace.service.traces.verdicts import Decided

_KEPT = np.array(
    [
        HI,
        LO,
        FIRST_SEEN,
        LAST_SEEN,
        MIN_START,
        MAX_END,
        SPANS,
        ERRORS,
        FLAGS,
        ROOT_NAME_LEN,
        ROOT_SERVICE,
        SERVICES_1,
        SERVICES_2,
        POSITION_COUNT,
        *range(POSITION_0, POSITION_0 + POSITIONS),
    ]
)
_SHIFTS = np.array([0, 16, 32, 48])

BYTES_OF_TRACE = len(_KEPT) * 8 + 32
"""About those of a closed trace, before compression."""


def describe(decided: Decided, arrays: list[bytes]) -> dict[str, Any]:
    """A decided item as JSON; its arrays are added to ``arrays``."""
    found: dict[str, Any] = {
        "tenant": decided.tenant,
        "signals": [signal.to_json() for signal in decided.signals],
        "due_ns": decided.due_ns,
    }
    if decided.spilled is not None:
        found["spilled"] = decided.spilled.shape
        arrays.append(_shuffled(decided.spilled.T))
    if (closed := decided.closed) is not None:
        rows, services = _with_used_services(closed.rows[:, _KEPT], closed.services)
        lengths = rows[:, _at(ROOT_NAME_LEN)]
        names = closed.names[np.arange(NAME_BYTES) < lengths[:, None]]
        found |= {"traces": len(rows), "version": closed.rules.version, "services": services}
        arrays += [_shuffled(rows.T), names.tobytes()]
    return found


def _at(column: int) -> int:
    return int(np.flatnonzero(column == _KEPT)[0])


def _with_used_services(rows: Rows, services: Sequence[str]) -> tuple[Rows, list[str]]:
    """The rows with new service numbers, and the names of the services that occur."""
    packed = rows[:, [_at(SERVICES_1), _at(SERVICES_2)], None] >> _SHIFTS & 0xFFFF
    root = rows[:, _at(ROOT_SERVICE)]
    used = np.unique(np.concatenate([np.zeros(1, np.int64), packed.ravel(), root]))
    numbers = np.zeros(int(used[-1]) + 1, np.int64)
    numbers[used] = np.arange(len(used))
    rows = rows.copy()
    rows[:, _at(ROOT_SERVICE)] = numbers[root]
    rows[:, [_at(SERVICES_1), _at(SERVICES_2)]] = (numbers[packed] << _SHIFTS).sum(axis=2)
    return rows, [services[number] for number in used.tolist()]


def _shuffled(columns: Rows) -> bytes:
    """Columns as bytes: of each column the first bytes of all values, then the second, …"""
    octets = np.ascontiguousarray(columns).view(np.uint8).reshape(len(columns), -1, 8)
    return octets.transpose(0, 2, 1).tobytes()


class ArrayReader:
    """Reads the arrays of a message, one after the other."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self._offset = offset

    def rows(self, count: int, columns: int) -> Rows:
        """The next ``count`` rows."""
        octets = self.bytes(count * columns * 8).reshape(columns, 8, count)
        found = np.ascontiguousarray(octets.transpose(0, 2, 1)).view(np.int64)
        return np.ascontiguousarray(found.reshape(columns, count).T)

    def bytes(self, count: int) -> Bytes:
        """The next ``count`` bytes."""
        found = np.frombuffer(self._data, np.uint8, count, self._offset)
        self._offset += count
        return found


def read_decided(found: dict[str, Any], arrays: ArrayReader) -> Decided:
    """The inverse of :func:`describe`. Closed traces have no matches, and rules that are empty but
    for their version."""
    tenant, spilled, closed = found["tenant"], None, None
    if "spilled" in found:
        spilled = arrays.rows(*found["spilled"])
    if "traces" in found:
        count = found["traces"]
        rows = np.zeros((count, SLOT_COLUMNS), np.int64)
        rows[:, _KEPT] = arrays.rows(count, len(_KEPT))
        lengths = rows[:, ROOT_NAME_LEN]
        names = np.zeros((count, NAME_BYTES), np.uint8)
        names[np.arange(NAME_BYTES) < lengths[:, None]] = arrays.bytes(int(lengths.sum()))
        closed = DueTraces(
            tenant,
            _rules(found["version"]),
            True,
            rows,
            names,
            np.zeros((0, ENTRY_COLUMNS), np.int64),
            np.zeros(count + 1, np.int64),
            found["services"],
            received_ns=found["due_ns"],
            spans=int(rows[:, SPANS].sum()),
        )
    signals = [Signal.from_json(each) for each in found["signals"]]
    return Decided(tenant, signals, closed, spilled, found["due_ns"])


@lru_cache(maxsize=1024)
def _rules(version: str) -> CompiledRules:
    """No rules: the version is all that readers use."""
    return compile_rules((), version)
