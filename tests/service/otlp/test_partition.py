"""The function of tenant and trace id that gives the partition."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from betrace.service.otlp.partition import partition_of

pytestmark = pytest.mark.kernel

FIXED = [
    ("default", bytes(range(16)), 16, 5),
    ("default", bytes(range(16)), 64, 5),
    ("acme", bytes(range(16)), 16, 2),
    ("acme", b"\xff" * 16, 16, 5),
    ("müller", b"\x80" + bytes(15), 1000, 33),
    ("default", bytes(15) + b"\1", 7, 2),
]
MASK = 2**64 - 1


def mix(x: int) -> int:
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & MASK
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ x >> 33


def documented(tenant: str, trace_id: bytes, partitions: int) -> int:
    seed = int.from_bytes(hashlib.sha256(tenant.encode()).digest()[:8], "big")
    hi, lo = int.from_bytes(trace_id[:8], "big"), int.from_bytes(trace_id[8:], "big")
    return (mix(mix(seed ^ hi) ^ lo) & MASK >> 1) % partitions


@pytest.mark.parametrize(("tenant", "trace_id", "partitions", "expected"), FIXED)
def test_partitions_never_change(
    tenant: str, trace_id: bytes, partitions: int, expected: int
) -> None:
    """A trace whose partition changed would be judged twice, each time in part."""
    assert partition_of(tenant, trace_id, partitions) == expected


def test_the_partition_is_as_documented() -> None:
    rng = random.Random(1)
    for _ in range(300):
        case = rng.choice(["default", "a", "ü" * 20]), rng.randbytes(16), rng.randrange(1, 300)
        assert partition_of(*case) == documented(*case)


def test_traces_are_spread_evenly_even_if_their_ids_are_consecutive() -> None:
    counts = Counter(partition_of("t", bytes(12) + n.to_bytes(4, "big"), 16) for n in range(3200))
    assert len(counts) == 16
    assert max(counts.values()) < 270
    assert min(counts.values()) > 140
