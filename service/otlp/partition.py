"""The partition of a span: a hash of its tenant and trace id, modulo the number of partitions.

All spans of a trace are in one partition. The function never changes, because a trace whose spans
were in two partitions would be judged twice, each time in part:

- *seed*: the first 8 bytes of SHA-256 of the tenant's name in UTF-8, big-endian.
- *mix(x)*: the finalizer of MurmurHash3's 64-bit variant (Appleby, public domain).
- *hash* = mix(mix(seed ^ the first 8 bytes of the trace id) ^ its last 8 bytes), big-endian.
- The partition is the lower 63 bits of the hash modulo the number of partitions.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Rows
from betrace.service.otlp.primitives import int64

_FIRST = -0x00AE502812AA7333  # 0xff51afd7ed558ccd as int64
_SECOND = -0x3B314601E57A13AD  # 0xc4ceb9fe1a85ec53 as int64
_LOWER_31 = 0x7FFFFFFF
_LOWER_63 = 0x7FFFFFFFFFFFFFFF


@lru_cache(10_000)
def tenant_seed(tenant: str) -> int:
    """The part of the hash that depends on the tenant, as int64."""
    return int.from_bytes(hashlib.sha256(tenant.encode()).digest()[:8], "big", signed=True)


@general_kernel
def _mix(x: Any) -> Any:
    x ^= (x >> 33) & _LOWER_31
    x *= int64(_FIRST)
    x ^= (x >> 33) & _LOWER_31
    x *= int64(_SECOND)
    x ^= (x >> 33) & _LOWER_31
    return x


@general_kernel
def partition(seed: int, trace_hi: int, trace_lo: int, partitions: int) -> int:
    """The partition of a trace, given :func:`tenant_seed` and the halves of its id as int64."""
    mixed = _mix(_mix(int64(seed) ^ int64(trace_hi)) ^ int64(trace_lo))
    found: int = (mixed & int64(_LOWER_63)) % int64(partitions)
    return found


@general_kernel
def _number_all(seed: int, ids: Rows, partitions: int, found: Rows) -> None:
    for row in range(ids.shape[0]):
        found[row] = partition(seed, ids[row, 0], ids[row, 1], partitions)


def partition_numbers(tenant: str, ids: Rows, partitions: int) -> Rows:
    """The partitions of traces, rows (hi, lo)."""
    found = np.empty(len(ids), np.int64)
    with np.errstate(over="ignore"):
        _number_all(tenant_seed(tenant), ids, partitions, found)
    return found


def partition_of(tenant: str, trace_id: bytes, partitions: int) -> int:
    """The partition of the trace with this id of 16 bytes."""
    hi, lo = np.frombuffer(trace_id, ">i8").tolist()
    with np.errstate(over="ignore"):
        return int(partition(tenant_seed(tenant), hi, lo, partitions))
