"""The memory of closed traces: what it holds it never denies; what it claims falsely is rare."""

from __future__ import annotations

import numpy as np
import pytest

from betrace.service.otlp.columns import Rows
from betrace.service.traces.late_filter import ClosedTraces

pytestmark = pytest.mark.kernel

TRACES = 400  # of the 4096 that a generation of this size takes


def _ids(shape: str, seed: int) -> Rows:
    ids = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, (TRACES, 2))
    if shape == "high half zero":  # a tracer with ids of 64 bits
        ids[:, 0] = 0
    elif shape == "low half zero":
        ids[:, 1] = 0
    elif shape == "counting":
        ids[:, 0] = 0
        ids[:, 1] = np.arange(TRACES) + seed * TRACES
    return ids


@pytest.mark.parametrize("shape", ["random", "high half zero", "low half zero", "counting"])
def test_few_new_traces_are_taken_for_closed_ones(shape: str) -> None:
    closed = ClosedTraces(1 << 14)
    held = _ids(shape, 1)
    closed.add("tenant", held)
    assert all(closed.may_hold("tenant", int(hi), int(lo)) for hi, lo in held)
    claimed = sum(closed.may_hold("tenant", int(hi), int(lo)) for hi, lo in _ids(shape, 2))
    assert claimed < TRACES / 100


def test_a_trace_is_held_for_its_own_tenant() -> None:
    closed = ClosedTraces(1 << 14)
    held = _ids("random", 1)
    closed.add("one", held)
    claimed = sum(closed.may_hold("other", int(hi), int(lo)) for hi, lo in held)
    assert claimed < TRACES / 100


def test_what_stands_for_a_tenant_is_a_secret_of_the_process() -> None:
    one, two = ClosedTraces(1 << 14), ClosedTraces(1 << 14)
    assert one.salt("tenant") == one.salt("tenant")
    assert one.salt("tenant") != one.salt("tenants")
    assert one.salt("tenant") != two.salt("tenant")
    assert 0 <= one.salt("tenant") < 2**63
