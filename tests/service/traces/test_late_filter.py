"""The filter of closed traces: no false negatives, and few false positives."""

from __future__ import annotations

import numpy as np
import pytest

from betrace.service.otlp.columns import Rows
from betrace.service.traces.late_filter import ClosedTraces

pytestmark = pytest.mark.kernel

TRACES = 400  # of the 4096 that fit into a generation of this size


def _ids(shape: str, seed: int) -> Rows:
    ids = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, (TRACES, 2))
    if shape == "high half zero":  # a tracer with 64-bit ids
        ids[:, 0] = 0
    elif shape == "low half zero":
        ids[:, 1] = 0
    elif shape == "counting":
        ids[:, 0] = 0
        ids[:, 1] = np.arange(TRACES) + seed * TRACES
    return ids


@pytest.mark.parametrize("shape", ["random", "high half zero", "low half zero", "counting"])
def test_added_traces_are_found_and_few_others(shape: str) -> None:
    closed = ClosedTraces(1 << 14)
    added = _ids(shape, 1)
    closed.add("tenant", added)
    assert all(closed.may_hold("tenant", int(hi), int(lo)) for hi, lo in added)
    false_positives = sum(closed.may_hold("tenant", int(hi), int(lo)) for hi, lo in _ids(shape, 2))
    assert false_positives < TRACES / 100


def test_a_trace_is_added_for_one_tenant_only() -> None:
    closed = ClosedTraces(1 << 14)
    added = _ids("random", 1)
    closed.add("one", added)
    false_positives = sum(closed.may_hold("other", int(hi), int(lo)) for hi, lo in added)
    assert false_positives < TRACES / 100


def test_the_salt_of_a_tenant_is_a_secret_of_the_process() -> None:
    one, two = ClosedTraces(1 << 14), ClosedTraces(1 << 14)
    assert one.salt("tenant") == one.salt("tenant")
    assert one.salt("tenant") != one.salt("tenants")
    assert one.salt("tenant") != two.salt("tenant")
    assert 0 <= one.salt("tenant") < 2**63
