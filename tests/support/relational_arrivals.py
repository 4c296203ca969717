"""Compares the engine with the naive reading of rules: spans of traces arrive in any order, split
into any requests, some twice, with closings, forgotten traces and restarts between them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from betrace.service.rules.parse import parse
from betrace.service.storage.spanlog.log import SpanLog
from tests.support import relations_oracle
from tests.support.relational_engine import RelationalEngine
from tests.support.relational_strategies import case_traces, encode_cases, relational_rules

IDS = [bytes([i]) * 16 for i in (1, 2)]
_TENANTS = (f"t{number}" for number in itertools.count())

ARRIVALS = {
    "rules": st.lists(relational_rules(), min_size=1, max_size=3),
    "traces": st.lists(case_traces(), min_size=1, max_size=2),
    "seed": st.integers(0, 2**32),
    "between": st.lists(
        st.sampled_from(["go on", "close", "forget", "restart"]), min_size=5, max_size=5
    ),
}


def check_arrivals(
    log: SpanLog,
    rules: Sequence[str],
    traces: Sequence[list[dict[str, Any]]],
    seed: int,
    between: Sequence[str],
) -> None:
    """Assert that the signals that remain are those of the whole traces."""
    rng = random.Random(seed)
    spans = [(trace_id, span) for trace_id, of in zip(IDS, traces, strict=False) for span in of]
    spans += rng.choices(spans, k=2)
    rng.shuffle(spans)
    cuts = sorted(rng.randint(0, len(spans)) for _ in range(4))
    engine = RelationalEngine([parse(rule) for rule in rules], log, next(_TENANTS))
    for (a, b), then in zip(pairwise([0, *cuts, len(spans)]), between, strict=True):
        if b > a:
            engine.send(*(encode_cases([span], trace_id) for trace_id, span in spans[a:b]))
        if then in ("close", "forget"):
            engine.close()
        if then == "forget":
            engine.forget()
        if then == "restart":
            engine.restart()
    engine.close()
    whole = [parse(rule, relational=True) for rule in rules]
    assert engine.active == {
        (trace_id.hex(), f"r{number}")
        for trace_id, of in zip(IDS, traces, strict=False)
        for number, rule in enumerate(whole)
        if relations_oracle.breaks(rule, of)
    }
