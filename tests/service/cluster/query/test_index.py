"""What an evaluator learns from the index at a query node."""

from __future__ import annotations

import numpy as np
import pytest

from betrace.service.cluster.query import index_messages, remote_index
from betrace.service.cluster.query.applied import AppliedPositions
from betrace.service.cluster.query.index import TraceIndexServer
from betrace.service.cluster.query.index_messages import (
    IndexAnswer,
    IndexMessageError,
    IndexRequest,
    pack_answer,
    pack_request,
    unpack_answer,
    unpack_request,
)
from betrace.service.cluster.query.remote_index import RemoteTraceIndex
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.pipeline.history import HistoryUnavailable
from betrace.service.pipeline.trace_rows import frame_columns, trace_table
from betrace.service.storage.duck.queries import TraceRow
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.jetstream.errors import NatsUnavailable
from tests.support.failing_stores import due, signal


def name(number):
    return f"{number + 1:032x}"


@pytest.fixture
def store(tmp_path):
    with DuckStore(tmp_path) as found:
        yield found


NAMES = TenantNames({"again": 7, "soon": 9}, {"gone", "soon"})


class Index:
    """An index at a query node, and an evaluator that asks it without NATS."""

    def __init__(self, store, applied=5, decided=5):
        self.positions = AppliedPositions([(2, applied)])
        self.waiting = False
        self.server = TraceIndexServer(store, self.positions, NAMES, lambda: self.waiting)
        self.decided = decided
        self.asked = []
        self.remote = RemoteTraceIndex(2, self.ask, lambda: self.decided)

    def ask(self, data):
        self.asked.append(unpack_request(data))
        return self.server.answer("", data)


def test_a_partition_without_output_needs_that_of_its_parent(store):
    index = Index(store, decided=0)
    remote = RemoteTraceIndex(7, index.ask, lambda: index.decided, lambda: (2, 6))
    with pytest.raises(HistoryUnavailable, match="up to 5, but 6 is needed"):
        remote.find_traces("acme", [name(1)])
    index.positions.enter(2, 6, [], 0)
    assert remote.find_traces("acme", [name(1)]) == {}
    index.decided = 1
    with pytest.raises(HistoryUnavailable, match="partition 7 up to 0, but 1 is needed"):
        remote.find_traces("acme", [name(1)])
    assert [(each.partition, each.upto) for each in index.asked] == [(2, 6), (2, 6), (7, 1)]


def test_rows_and_signals_are_those_of_the_store(store):
    traces = due(1, 2, 3)
    store.write(
        "acme",
        traces=trace_table(traces),
        signals=[signal(2)],
        frames=frame_columns(np.array([[0, 2, 700, 800, 900]])),
    )
    index = Index(store)
    names = [name(1), name(2), name(8)]
    assert index.remote.find_traces("acme", names) == store.find_traces("acme", names)
    assert index.remote.raised_of("acme", names) == store.raised_of("acme", names)
    assert len(index.asked) == 1  # the rows and the signals came with one answer
    assert index.remote.find_traces("acme", names)[name(1)].positions == [2, 700, 800, 900]


def test_an_answer_that_is_not_applied_far_enough_does_not_count(store):
    index = Index(store, applied=4, decided=5)
    with pytest.raises(HistoryUnavailable, match="up to 4, but 5 is needed"):
        index.remote.find_traces("acme", [name(1)])
    assert index.server.behind == 1
    index.positions.enter(2, 5, [], 0)
    assert index.remote.find_traces("acme", [name(1)]) == {}


def test_a_file_that_is_being_rebuilt_does_not_answer(store):
    store.incomplete.add("acme")
    with pytest.raises(HistoryUnavailable, match="rebuilt"):
        Index(store).remote.find_traces("acme", [name(1)])


def test_without_a_query_node_the_history_is_unavailable():
    def ask(data):
        raise NatsUnavailable("no reply")

    with pytest.raises(HistoryUnavailable, match="no query node answers"):
        RemoteTraceIndex(0, ask, lambda: 0).raised_of("acme", [name(1)])


def test_damaged_answers_do_not_count():
    with pytest.raises(HistoryUnavailable):
        RemoteTraceIndex(0, lambda data: b"junk", lambda: 0).find_traces("acme", [name(1)])


def test_deleted_tenants_have_no_traces(store):
    assert Index(store).remote.find_traces("gone", [name(1)]) == {}


def test_an_answer_is_asked_again_after_a_decision(store):
    index = Index(store)
    assert index.remote.find_traces("acme", [name(1)]) == {}
    store.write("acme", traces=trace_table(due(1)))
    assert index.remote.find_traces("acme", [name(1)]) == {}  # nothing was decided in between
    index.positions.enter(2, 6, [], 0)
    index.decided = 6
    assert set(index.remote.find_traces("acme", [name(1)])) == {name(1)}


def test_rows_in_fallback_files_are_waited_for(store):
    """They count as applied, although DuckDB does not have them yet."""
    index = Index(store)
    index.waiting = True
    with pytest.raises(HistoryUnavailable, match="rows wait in fallback files"):
        index.remote.find_traces("acme", [name(1)])
    store.write("acme", traces=trace_table(due(1)))
    index.waiting = False
    assert index.remote.find_traces("acme", [name(1)])[name(1)].spans


def test_many_traces_take_several_requests(store, monkeypatch):
    monkeypatch.setattr(remote_index, "MOST_TRACES", 2)
    store.write("acme", traces=trace_table(due(1, 2, 3)))
    index = Index(store)
    names = [name(each) for each in range(5)]
    assert set(index.remote.find_traces("acme", names)) == {name(1), name(2), name(3)}
    assert [len(each.traces) for each in index.asked] == [2, 2, 1]


def a_row(trace_id, positions):
    return TraceRow(trace_id, 1, 2, 3, 4, 5, 0, None, "shop", ["shop"], False, "v1", positions)


def test_answers_are_cut_to_what_fits(monkeypatch):
    monkeypatch.setattr(index_messages, "MOST_BYTES", 4000)
    names = [name(number) for number in range(8)]
    rows = {each: a_row(each, [hash((each, k)) & 2**47 - 1 for k in range(150)]) for each in names}
    found = unpack_answer(pack_answer(IndexAnswer(9, 8, rows), names))
    assert 1 <= found.answered < 8
    assert found.rows == {each: rows[each] for each in names[: found.answered]}


def test_a_trace_that_does_not_fit_is_partial(monkeypatch):
    monkeypatch.setattr(index_messages, "MOST_BYTES", 1000)
    row = a_row(name(1), [hash(k / 7) & 2**47 - 1 for k in range(5000)])
    found = unpack_answer(pack_answer(IndexAnswer(9, 1, {name(1): row}), [name(1)]))
    assert found.answered == 1
    assert found.rows[name(1)].partial
    assert found.rows[name(1)].positions == []


def test_requests_survive_the_transport():
    request = IndexRequest(3, 17, "acme", [name(1)])
    assert unpack_request(pack_request(request)) == request


def test_tenants_have_other_names_after_a_deletion(store):
    store.write("again", traces=trace_table(due(1, tenant="again")))
    remote = Index(store).remote
    assert remote.find_traces("again", [name(1)]) == {}  # asked for what was deleted
    assert remote.find_traces("again=7", [name(1)]).keys() == {name(1)}
    for coming in ("again=8", "soon=9"):
        with pytest.raises(HistoryUnavailable, match="created again"):
            remote.find_traces(coming, [name(1)])


@pytest.mark.parametrize(
    "data", [b"", b"junk", index_messages._pack({}), index_messages._pack([1])]
)
def test_other_bytes_are_refused(data):
    with pytest.raises(IndexMessageError):
        unpack_request(data)
    with pytest.raises(IndexMessageError):
        unpack_answer(data)
    found = unpack_answer(TraceIndexServer(None, AppliedPositions(), NAMES).answer("", data))
    assert found.problem is not None
