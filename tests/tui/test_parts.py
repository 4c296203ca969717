"""Units: formatting, state, problems, server-sent events and the client."""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.tui import client as client_module
from betrace.tui import format, tones
from betrace.tui.client import ApiClient, ClientError, read_events, segment
from betrace.tui.format import plot
from betrace.tui.panels.details import trial_text
from betrace.tui.panels.health import HealthProblem, badges, problems, stage_condition
from betrace.tui.state import HISTORY, ServiceState, parse
from betrace.tui.widgets.text_filter import matches
from tests.support.tui_fake import T0, URL, FakeApi, snapshot_at

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


# Text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (math.inf, "–"),
        (0, "0"),
        (0.25, "0.2"),
        (3.0, "3"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (4_500_000, "4.5M"),
        (7e15, "7000T"),
    ],
)
def test_numbers_are_short(value, shown):
    assert format.number(value) == shown


@given(st.floats(0, 9.9e14))
def test_a_number_has_five_characters_at_most(value):
    assert len(format.number(value)) <= 5


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (-1, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (7200, "2 h"),
        (4 * 86400 + 3 * 3600, "4 d 3 h"),
    ],
)
def test_durations(seconds, shown):
    assert format.duration(seconds) == shown


def test_percentages_times_sizes_and_counts():
    assert [format.percent(v) for v in (None, 0, 0.055, 0.5, 0.999, 1)] == [
        "–", "0 %", "5.5 %", "50 %", "99.9 %", "100 %",
    ]  # fmt: skip
    assert [format.millis(v) for v in (None, 1.23, 56.7, 1234)] == ["–", "1.2 ms", "57 ms", "1.2 s"]
    assert [format.size(v) for v in (None, 12, 2048, 3 << 30, 5e15)] == [
        "–", "12 B", "2.0 KiB", "3.0 GiB", "4547 TiB",
    ]  # fmt: skip
    assert format.count(None) == "–"
    assert format.count(1234567) == "1\u202f234\u202f567"
    assert [format.many(n, "tenant") for n in (0, 1, 2)] == ["0 tenants", "1 tenant", "2 tenants"]
    assert [format.many(n, "more entry") for n in (1, 2)] == ["1 more entry", "2 more entries"]
    assert [format.many(n, "key") for n in (0, 1)] == ["0 keys", "1 key"]
    assert format.ago(None, 5) == "never"
    assert format.ago(4.5, 5) == "now"
    assert format.age(5, 200) == "3 min"
    assert format.age(None, 200) == "never"
    assert format.clock(None) == "–"


@given(st.floats(-1, 2), st.integers(1, 60), st.floats(-1, 2))
def test_a_bar_has_its_width_and_never_hides_a_small_value(fraction, width, peak):
    bar = format.bar(fraction, width, peak)
    assert len(bar) == width
    assert bar.startswith("█") == (fraction > 0)
    if width > 1:
        assert bar.endswith("█") == (fraction >= 1)
    assert bar == "".join(sorted(bar, key="█▒░".index))


@given(st.lists(st.floats(0, 1e9), max_size=80), st.integers(0, 50))
def test_a_plot_has_one_column_for_each_point_that_fits(points, width):
    line = plot(points, width)
    assert len(line) == min(len(points), max(1, width))
    if line and max(points[-len(line) :]) > 0:
        assert "█" in line


def test_filters_match_in_any_case_and_invert():
    assert matches("Span-Ingestion", "span")
    assert not matches("Span-Ingestion", "!span")
    assert matches("Span-Ingestion", "!store")
    assert matches("anything", "")
    assert matches("anything", "!")


def test_the_time_of_the_next_trial():
    assert trial_text("closed", 0.0) == "calls are permitted"
    assert trial_text("open", 12.2) == "in 12 s"
    assert trial_text("half_open", 0.0) == "now"
    assert trial_text("forced_open", None) == "only after an operator resets it"


def test_durations_below_a_millisecond_are_microseconds():
    shown = [format.millis(value) for value in (0, 0.0124, 0.9994, 0.9996)]
    assert shown == ["0 µs", "12 µs", "999 µs", "1.0 ms"]


@given(st.lists(st.floats(0, 1e9), max_size=80), st.integers(1, 50))
def test_condensed_points_fit_and_keep_the_maximum(points, width):
    condensed = format.condense(points, width)
    assert len(condensed) <= width
    assert max(condensed, default=None) == max(points, default=None)
    if len(points) <= width:
        assert condensed == points  # a short history is not stretched


def test_a_graph_of_several_lines():
    assert format.plot_lines([0, 1, 2, 4], 2) == ["   █", " ▄██"]
    assert format.plot_lines([0, 1000, 1], 1) == [" █▁"]
    assert format.plot_lines([], 2) == ["", ""]


def test_an_active_signal_is_red_and_a_medium_one_yellow():
    assert tones.signal_tone("active") == "bad"
    assert tones.signal_tone("retracted") == "quiet"
    found = [tones.severity(word)[1] for word in tones.SEVERITIES]
    assert found == ["bad", "bad", "busy", "quiet", "quiet"]
    assert tones.severity("medium")[0] == "▲ medium"


# State


@given(st.dictionaries(st.sampled_from(sorted(snapshot_at(0))), JSON))
def test_parsing_accepts_any_json(data):
    state = ServiceState()
    state.update(parse(snapshot_at(0), 0.0))
    state.update(parse(data, 1.0))
    problems(state)


def test_rates_come_from_the_last_two_snapshots():
    state = ServiceState()
    assert state.rate("accepted") is None
    state.update(parse(snapshot_at(10), T0))
    assert state.rate("accepted") is None
    state.update(parse(snapshot_at(12), T0 + 2))
    assert state.rate("accepted") == 12_000
    assert state.rate("signals") == 40
    assert state.rate("rule-evaluation.in") == 1500
    assert state.rate("publicKeys.hit_rate") == 0.95
    assert state.history("accepted") == [12_000]


def test_a_restart_gives_no_negative_rates():
    state = ServiceState()
    state.update(parse(snapshot_at(10), T0))
    state.update(parse(snapshot_at(5), T0 + 1))
    assert state.rate("accepted") is None


def test_histories_are_bounded():
    state = ServiceState()
    for second in range(HISTORY + 50):
        state.update(parse(snapshot_at(second), T0 + second))
    assert len(state.history("accepted")) == HISTORY
    data = snapshot_at(HISTORY + 50)
    for number in range(500):
        data["caches"][f"cache {number}"] = {"hitCount": 0, "missCount": 0}
    state.update(parse(data, T0 + HISTORY + 50))
    data = copy.deepcopy(data)
    data["metrics"]["uptime"] += 1
    for cache in data["caches"].values():
        cache["hitCount"] += 1
    state.update(parse(data, T0 + HISTORY + 51))
    assert state.rate("cache 10.hit_rate") == 1.0
    assert state.rate("cache 499.hit_rate") is None


def test_problems_are_listed_worst_first():
    data = snapshot_at(60)
    data["queues"][3] |= {"utilizationPercent": 55.0}
    data["queues"][4] |= {"utilizationPercent": 10.0, "waitingSenders": 2}
    data["components"]["projection"] = {"status": "failed", "detail": "no progress"}
    data["pipeline"]["ingestion"] = "draining"
    state = ServiceState()
    state.update(parse(data, T0))
    assert problems(state) == [
        HealthProblem("bad", "projection is 10 % full, 2 blocked", "PipelinePanel"),
        HealthProblem("bad", "projection: no progress", "PipelinePanel"),
        HealthProblem("bad", "breaker ledger: open", "BreakersPanel"),
        HealthProblem("busy", "ingestion is draining", "PipelinePanel"),
        HealthProblem("busy", "storage-write is 55 % full", "PipelinePanel"),
    ]
    assert problems(ServiceState()) == []


def test_badges_count_problems_and_dead_letters():
    data = snapshot_at(60)
    data["queues"][3] |= {"utilizationPercent": 55.0}
    data["queues"][4] |= {"utilizationPercent": 95.0}
    data["components"]["dead-letters"] = {"status": "degraded", "detail": "53 letters"}
    state = ServiceState()
    state.update(parse(data, T0))
    assert badges(state) == {
        "PipelinePanel": ("2", "bad"),
        "BreakersPanel": ("1", "bad"),
        "DeadLettersPanel": ("53", "busy"),
    }


def test_a_lost_connection_and_a_service_that_is_not_ready_are_problems():
    data = snapshot_at(60)
    del data["components"]["breaker-ledger"]
    state = ServiceState()
    state.update(parse(data, T0))
    assert problems(state) == []
    state.stale = True
    assert problems(state) == [
        HealthProblem("bad", "no connection; this is the state at 22:13:20", "SystemPanel")
    ]
    state.stale = False
    state.update(parse(data | {"ready": False}, T0 + 1))
    assert problems(state) == [HealthProblem("bad", "the service is not ready", "SystemPanel")]


# Server-sent events and the client


def collect(*parts: bytes) -> list[tuple[str, bytes]]:
    async def source() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async def read() -> list[tuple[str, bytes]]:
        return [event async for event in read_events(source())]

    return asyncio.run(read())


STREAM = (
    b": comment\n\nevent: a\ndata: 1\ndata: 2\n\r\nid: 7\r\ndata:x\r\n\r\nevent: b\n\ndata: left"
)


def test_events_are_parsed_as_the_standard_says():
    assert collect(STREAM) == [("a", b"1\n2"), ("message", b"x")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
def test_events_may_be_split_anywhere(cuts):
    bounds = [0, *cuts, len(STREAM)]
    parts = [STREAM[a:b] for a, b in itertools.pairwise(bounds)]
    assert collect(*parts) == collect(STREAM)


def test_an_event_that_is_too_large_is_rejected(monkeypatch):
    monkeypatch.setattr(client_module, "MAX_EVENT", 100)
    with pytest.raises(ClientError, match="larger than 100 bytes"):
        collect(b"data: " + b"x" * 101)
    with pytest.raises(ClientError, match="larger than 100 bytes"):
        collect(*[b"data: 0123456789\n"] * 11)


def ask(answer: httpx.Response, **params: object) -> tuple[object, httpx.Request]:
    """Send a request, and return its result and the request."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer

    async def get() -> object:
        async with ApiClient(URL + "/", transport=httpx.MockTransport(handle)) as client:
            return await client.get("/x", **params)

    return asyncio.run(get()), seen[0]


def test_parameters_that_are_none_are_omitted():
    _, request = ask(httpx.Response(200, json={}), a=None, b=True, c=5, d="ä&")
    assert request.url.query == b"b=true&c=5&d=%C3%A4%26"


def test_an_answer_without_a_body_is_empty():
    assert ask(httpx.Response(204))[0] == {}


def test_control_characters_do_not_reach_the_terminal():
    answer = {"a\u001b": ["\u001b[31mred\n", {"b": "x\u202ey\x9b", "n": 1}], "ü": "–"}
    assert ask(httpx.Response(200, json=answer))[0] == {
        "a\ufffd": ["\ufffd[31mred\n", {"b": "x\ufffdy\ufffd", "n": 1}],
        "ü": "–",
    }


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (httpx.Response(200, text="[]"), "not understood", "JSON that is not an object"),
        (httpx.Response(500, text="oops"), "refused", "answered with status 500"),
        (httpx.Response(400, json={"error": {"message": "no"}}), "refused", "no"),
    ],
)
def test_invalid_answers_are_errors(answer, kind, message):
    with pytest.raises(ClientError, match=message) as found:
        ask(answer)
    assert found.value.kind == kind


def test_names_in_paths_are_quoted():
    assert segment("a/b c?") == "a%2Fb%20c%3F"


def test_a_silent_stream_times_out():
    api = FakeApi()

    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late", request=request)

    api.routes["GET", "/api/performance/stream"] = late

    async def read() -> None:
        async with ApiClient(URL, transport=httpx.MockTransport(api._handle)) as client:
            async for _ in client.snapshots():
                pass

    with pytest.raises(ClientError) as found:
        asyncio.run(read())
    assert found.value.kind == "timed out"


def test_a_stage_that_drops_batches_is_not_called_working():
    state = ServiceState()
    state.update(parse(snapshot_at(60), T0))
    data = snapshot_at(61)
    data["metrics"]["stages"]["rule-evaluation"]["dead"] = 3
    state.update(parse(data, T0 + 1))
    assert state.now is not None
    words = {stage.name: stage_condition(stage, state) for stage in state.now.stages}
    assert words["rule-evaluation"] == ("bad", "dropping")
    assert words["storage-write"] == ("good", "working")
