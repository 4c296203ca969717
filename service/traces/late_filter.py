"""A filter of the traces that were closed and are no longer in memory.

It distinguishes new traces, which are nearly all, from late ones without a query: a Bloom filter in
which all bits of a trace are in one cache line ("Cache-, Hash- and Space-Efficient Bloom Filters",
Putze, Sanders and Singler, 2007). It has two generations; when the younger one is full, the older
one is cleared. There are no false negatives. One new trace in several hundred is a false positive,
which costs a lookup in the trace index.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import Rows

_LINE = 8  # words of 64 bits
_BITS = 8  # bits set for a trace
_BITS_PER_TRACE = 16
_MIX_1 = 0x5851F42D4C957F2D
_MIX_2 = 0x2545F4914F6CDD1D


@lean_kernel
def _hash(value: int, multiplier: int) -> int:
    mixed = value * multiplier
    return mixed ^ (mixed >> 32 & 0xFFFFFFFF)


@lean_kernel
def _place(salt: int, hi: int, lo: int) -> int:
    """Chooses the line, by both halves, because tracers with 64-bit ids leave one half zero."""
    return _hash(hi ^ _hash(lo ^ salt, _MIX_2), _MIX_1)


@lean_kernel
def may_hold(filters: Rows, salt: int, hi: int, lo: int) -> bool:
    """Whether a trace may be in one of the generations; ``salt`` is :meth:`ClosedTraces.salt`."""
    place = _place(salt, hi, lo)
    bits = _hash(lo ^ place, _MIX_2)
    line = (place & (filters.shape[1] // _LINE - 1)) * _LINE
    for generation in range(2):
        found = True
        rest = bits
        for _ in range(_BITS):
            word = line + (rest & 7)
            if not filters[generation, word] >> (rest >> 3 & 63) & 1:
                found = False
                break
            rest = _hash(rest, _MIX_1)
        if found:
            return True
    return False


@lean_kernel
def add(filters: Rows, generation: int, salt: int, hi: int, lo: int) -> None:
    """Add a trace to a generation."""
    place = _place(salt, hi, lo)
    bits = _hash(lo ^ place, _MIX_2)
    line = (place & (filters.shape[1] // _LINE - 1)) * _LINE
    for _ in range(_BITS):
        filters[generation, line + (bits & 7)] |= np.int64(1) << (bits >> 3 & 63)
        bits = _hash(bits, _MIX_1)


@lean_kernel
def add_all(filters: Rows, generation: int, salt: int, ids: Rows) -> None:
    """Add traces, rows of (hi, lo), to a generation."""
    for k in range(len(ids)):
        add(filters, generation, salt, ids[k, 0], ids[k, 1])


class ClosedTraces:
    """The filter for all tenants, of ``size`` bytes (rounded down to a power of two). Not
    thread-safe: use one thread at a time.

    The bits of a trace depend on a ``secret`` (by default a random one), so that no tenant can
    choose ids that fill the filter or collide with another tenant's. A restart loads the filter
    from a file (:mod:`betrace.service.traces.filter_file`), and adds traces from the index."""

    def __init__(self, size: int, secret: bytes | None = None) -> None:
        self._secret = secrets.token_bytes(16) if secret is None else secret
        words = _LINE
        while 2 * words * 2 * 8 <= size:
            words *= 2
        self.filters = np.zeros((2, words), np.int64)
        self.capacity = words * 64 // _BITS_PER_TRACE
        """Traces that fit into one generation."""
        self._young = 0
        self._count = 0

    @property
    def added(self) -> bool:
        """Whether it has any trace."""
        return self._count > 0

    def salt(self, tenant: str) -> int:
        """The tenant's number in the hashes: 63 bits that clients cannot know."""
        digest = hashlib.blake2b(tenant.encode(), digest_size=8, key=self._secret).digest()
        return int.from_bytes(digest, "big") >> 1

    def generation(self, traces: int) -> int:
        """The generation to add ``traces`` more to; clears the older one if the younger is full."""
        if self._count + traces > self.capacity and self._count:
            self._young = 1 - self._young
            self.filters[self._young] = 0
            self._count = 0
        self._count += traces
        return self._young

    def saved(self) -> dict[str, Any]:
        """The filter without its bits (:attr:`filters`), as JSON."""
        return {"secret": self._secret.hex(), "young": self._young, "count": self._count}

    def restore(self, saved: dict[str, Any], filters: Rows) -> None:
        """Continue from what :meth:`saved` returned, and from the bits."""
        self._secret = bytes.fromhex(saved["secret"])
        self._young, self._count = saved["young"], saved["count"]
        self.filters = filters.copy()
        self.capacity = filters.shape[1] * 64 // _BITS_PER_TRACE

    def add(self, tenant: str, ids: Rows) -> None:
        """Add traces, rows of (hi, lo)."""
        generation = self.generation(len(ids))
        with np.errstate(over="ignore"):
            add_all(self.filters, generation, self.salt(tenant), ids)

    def may_hold(self, tenant: str, hi: int, lo: int) -> bool:
        """Whether a trace may be in the filter."""
        with np.errstate(over="ignore"):
            return bool(may_hold(self.filters, self.salt(tenant), hi, lo))
