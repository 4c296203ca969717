"""All of a trace was read back if its distinct span ids were, however many spans were read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from service.otlp.wire import scan_bodies
from service.rules.compile import compile_rules
from service.storage.duck import DuckStore
from service.storage.frames import Frame
from service.storage.spanlog import SpanLog
from service.tracehistory import TraceHistory
from service.traces.index import trace_tables
from service.traces.tenant import TenantTraces
from tests.service.traces.spans import TRACE, S, body

pytestmark = pytest.mark.kernel

OTHER = b"\2" * 16
IDS = np.array([[int.from_bytes(TRACE[:8], "big"), int.from_bytes(TRACE[8:], "big")]], np.int64)


@pytest.fixture
def stores(tmp_path):
    with DuckStore(tmp_path / "duck") as duck, SpanLog(tmp_path / "log") as log:
        yield duck, log


def closed(stores, requests: Sequence[Sequence[S]], lost: Sequence[int] = ()) -> TraceHistory:
    """A trace that came in these requests is closed and in the index; the log has not those of the
    requests that are ``lost``."""
    duck, log = stores
    traces = TenantTraces("default", compile_rules([]))
    for number, spans in enumerate(requests):
        data = body(*spans)
        batch = scan_bodies("default", [data])
        if number in lost:
            batch.positions = np.array([(99 << 32) + number + 1], np.int64)
        else:
            frame = Frame("protobuf", "", 1000, data, len(spans))
            batch.positions = np.array(log.append("default", [frame]), np.int64)
        traces.fold(batch, 1000)
    (due,) = traces.tables[-1].close_idle(2000, 2000)
    duck.write("default", signals=[], traces=trace_tables([due]), frames=None)
    return TraceHistory(duck, log, 1 << 20)


def test_spans_that_came_twice_are_one(stores):
    history = closed(stores, [[S(1), S(2)], [S(2), S(1)], [S(3)]])
    recalled = history.load("default", IDS)
    assert recalled.whole == [True]
    assert len(recalled.batch) == 5
    assert (history.recalled, history.partial) == (1, 0)


@pytest.mark.parametrize("again", [[S(1), S(2)], [S(1), S(1), S(1)], [S(2, trace=OTHER)]])
def test_a_repetition_does_not_stand_for_a_span_that_is_lost(stores, again):
    history = closed(stores, [[S(1), S(2)], again, [S(3)]], lost=[2])
    recalled = history.load("default", IDS)
    assert recalled.whole == [False]
    assert (history.recalled, history.partial) == (1, 1)


def test_a_request_lost_whose_spans_another_has_is_no_loss(stores):
    history = closed(stores, [[S(1), S(2)], [S(2), S(1)], [S(3)]], lost=[1])
    assert history.load("default", IDS).whole == [True]
