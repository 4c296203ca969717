"""Batches that are joined are what one scan of their bodies finds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from betrace.service.otlp.columns import (
    MESSAGE_LEN,
    MESSAGE_OFF,
    NAME_LEN,
    NAME_OFF,
    RESOURCE,
    SCOPE,
    SCOPE_NAME_LEN,
    SCOPE_NAME_OFF,
    SERVICE_LEN,
    SERVICE_OFF,
    SpanBatch,
    join,
)
from betrace.service.otlp.wire import scan_bodies
from tests.support.spans import S, body

pytestmark = pytest.mark.kernel


TEXTS = {
    "spans": [(NAME_OFF, NAME_LEN), (MESSAGE_OFF, MESSAGE_LEN)],
    "resources": [(SERVICE_OFF, SERVICE_LEN)],
    "scopes": [(SCOPE_NAME_OFF, SCOPE_NAME_LEN)],
}


def bodies() -> list[bytes]:
    return [
        body(S(1, "a", x="one"), S(2, "bb", service="shop", trace=b"\2" * 16)),
        body(S(3, "ccc")),
        b"",
        body(*(S(n, f"name {n}", service=f"s{n % 3}", x=str(n)) for n in range(10, 30))),
    ]


def scanned(parts: list[list[bytes]]) -> list[SpanBatch]:
    found = []
    for number, part in enumerate(parts):
        batch = scan_bodies("acme", part)
        batch.positions = np.array([10 * number + k + 1 for k in range(len(part))], np.int64)
        batch.received_ns = 100 - number
        found.append(batch)
    return found


@pytest.mark.parametrize("cuts", [[1], [2], [1, 2, 3], [3]])
def test_joined_batches_are_one_scan(cuts):
    all_bodies = bodies()
    edges = [0, *cuts, len(all_bodies)]
    parts = [all_bodies[a:b] for a, b in pairwise(edges)]
    joined = join(scanned(parts))
    (whole,) = scanned([all_bodies])
    assert np.array_equal(joined.buf, whole.buf)
    assert np.array_equal(joined.bodies, whole.bodies)
    for name, texts in TEXTS.items():
        rows, expected = getattr(joined, name), getattr(whole, name)
        for offset, length in texts:  # the offset of an empty text means nothing
            assert np.array_equal(rows[:, length], expected[:, length])
            empty = rows[:, length] <= 0
            rows[empty, offset] = expected[empty, offset]
        assert np.array_equal(rows, expected), name
    assert joined.tenant == "acme"
    assert joined.received_ns == 100
    assert len(joined.positions) == len(all_bodies)
    assert not joined.buf.flags.writeable
    assert [joined.name(row) for row in range(3)] == ["a", "bb", "ccc"]
    service = joined.resources[joined.spans[-1, RESOURCE]]
    assert joined.text(int(service[SERVICE_OFF]), int(service[SERVICE_LEN])) == "s2"
    assert joined.spans[-1, SCOPE] == len(joined.scopes) - 1


def test_a_single_batch_is_not_copied():
    (batch,) = scanned([bodies()])
    assert join([batch]) is batch
