"""Late spans of many traces at once: the traces are read back in rounds, within a time limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from betrace.service.otlp.columns import SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline import history as tracehistory
from betrace.service.pipeline.trace_rows import trace_table
from betrace.service.rules.parse import parse
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import FLAGS, PARTIAL, SPANS
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import decide_due
from tests.support.engine import compiled
from tests.support.spans import S, body

NOW = 1_700_000_000 * 10**9


def spans(number: int, traces: int, name: str) -> list[S]:
    return [S(number, name, trace=(k + 1).to_bytes(16, "big")) for k in range(traces)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SimpleNamespace]:
    w = SimpleNamespace(seconds=0.0, step=0.0)

    def clock() -> float:
        w.seconds += w.step
        return float(w.seconds)

    w.traces = TenantTraces("t", compiled([parse("when { pay } always { check }")]))
    w.closed = ClosedTraces(1 << 16)
    with DuckStore(tmp_path / "duck") as w.store, SpanLog(tmp_path / "log") as w.log:
        w.history = tracehistory.TraceHistory(w.store, w.log, 1 << 22, seconds=clock)
        yield w


def send(w: Any, sent: list[S]) -> None:
    raw = body(*sent)
    positions = w.log.append("t", [Frame("protobuf", "", NOW, raw, len(sent))])
    batch: SpanBatch = scan_bodies("t", [raw])
    batch.positions = np.array(positions)
    batch.received_ns = NOW
    w.traces.fold(batch, NOW, w.closed, w.history.load)


def close(w: Any) -> Any:
    (due,) = w.traces.close_due(NOW + 2, 1)
    decided = decide_due(due, NOW)
    w.store.write("t", signals=decided.signals, traces=trace_table(decided.closed))
    w.traces.evict(NOW + 10**12, 1, 0, w.closed)
    return due


@pytest.mark.parametrize(
    ("step", "most", "whole"),
    [(0.0, 5000, 60), (0.0, 30, 30), (0.7, 5000, 30), (9.0, 5000, 10)],
    ids=["all", "the number ends it", "the time ends it", "at least one round"],
)
def test_many_late_traces_are_read_in_rounds(world, monkeypatch, step, most, whole):
    monkeypatch.setattr(tracehistory, "ROUND_TRACES", 10)
    monkeypatch.setattr(tracehistory, "MOST_TRACES", most)
    send(world, spans(1, 60, "pay"))
    close(world)
    world.step = step
    send(world, spans(2, 60, "check"))
    due = close(world)
    partial = due.rows[:, FLAGS] & PARTIAL != 0
    assert len(due) == 60
    assert np.count_nonzero(~partial) == whole == world.history.recalled
    assert set(due.rows[~partial, SPANS].tolist()) == {2}
    assert set(due.rows[partial, SPANS].tolist()) <= {1}
    assert world.history.partial == 60 - whole
