"""Relational rules judged on many traces at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from betrace.service.otlp.columns import TRACE_HI, TRACE_LO
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.column_rules import ColumnRule
from betrace.service.rules.column_values import UnsupportedError
from betrace.service.rules.columns import TraceColumns
from betrace.service.rules.parse import parse
from betrace.service.rules.read_columns import columns_of
from betrace.service.rules.relations import judge
from tests.support.relational_strategies import case_traces, encode_cases, relational_rules
from tests.support.relations_oracle import breaks

pytestmark = pytest.mark.kernel


def columns(traces: list[list[dict[str, Any]]]) -> TraceColumns:
    bodies = [encode_cases(of, bytes([i]) * 16) for i, of in enumerate(traces, 1)]
    batch = scan_bodies("t", bodies)
    ids = dict.fromkeys(map(tuple, batch.spans[:, [TRACE_HI, TRACE_LO]].tolist()))
    return columns_of(batch, list(ids))


@given(relational_rules(), st.lists(case_traces(), min_size=1, max_size=3))
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_traces_that_may_break_a_rule(rule: str, traces: list[list[dict[str, Any]]]) -> None:
    syntax = parse(rule, relational=True)
    found = columns(traces)
    for k, of in enumerate(traces):
        assert (judge(syntax, found.tree(k)).clause is not None) == breaks(syntax, of)
    try:
        compiled = ColumnRule(syntax)
    except UnsupportedError:
        return
    for numbers in (range(len(traces)), [len(traces) - 1]):
        part = found.take(np.array(numbers))
        run = compiled.run(part)
        for k, number in enumerate(numbers):
            broken = breaks(syntax, traces[number])
            assert run.may_break[k] == broken or (run.unsure[k] and run.may_break[k])
