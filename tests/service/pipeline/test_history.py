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
from betrace.service.pipeline.trace_rows import frame_columns, trace_table
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
    for _, folded in w.traces.fold(batch, NOW, w.closed, w.history.load):
        if len(folded.spilled):
            w.store.write("t", frames=frame_columns(folded.spilled))


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
    monkeypatch.setattr(world.history, "_most_traces", most)
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


@pytest.mark.parametrize(
    ("step", "whole"), [(0.0, True), (9.0, False)], ids=["in time", "too long for the time"]
)
def test_a_long_trace_is_read_in_parts(world, monkeypatch, step, whole):
    """Of 30 requests, each with spans of three traces; one trace has a late span."""
    monkeypatch.setattr(tracehistory, "CHUNK_SPANS", 20)
    monkeypatch.setattr(tracehistory, "CHUNK_FRAMES", 4)
    monkeypatch.setattr(tracehistory, "LEAST_SPANS", 40)
    for number in range(1, 31):
        send(world, spans(number, 3, "pay"))
    close(world)
    world.step = step
    send(world, spans(99, 1, "check"))
    due = close(world)
    assert len(due) == 1
    assert bool(due.rows[0, FLAGS] & PARTIAL == 0) is whole
    assert bool(due.rows[0, SPANS] == 31) is whole
    assert (world.history.recalled, world.history.partial) == (1, int(not whole))
    (kept,) = world.store.find_traces("t", [f"{1:032x}"]).values()
    assert len(kept.positions) == 31


def test_what_fails_within_a_long_trace_leaves_nothing_of_it(world, monkeypatch):
    monkeypatch.setattr(tracehistory, "CHUNK_SPANS", 20)
    monkeypatch.setattr(tracehistory, "CHUNK_FRAMES", 4)
    for number in range(1, 31):
        send(world, spans(number, 3, "pay"))
    close(world)
    read_many, calls = world.log.read_many, [0]

    def failing(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise OSError("the disk")
        return read_many(*args)

    monkeypatch.setattr(world.log, "read_many", failing)
    with pytest.raises(OSError, match="the disk"):
        send(world, spans(99, 1, "check"))
    assert world.traces.open_count == world.traces.closed_count == 0
    calls[0] = 9
    send(world, spans(99, 1, "check"))
    due = close(world)
    assert (due.rows[0, SPANS], due.rows[0, FLAGS] & PARTIAL) == (31, 0)
