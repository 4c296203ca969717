"""The signals panel: stream, filters, details and waterfalls."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.tui.base import ViewTenant
from betrace.tui.panels import signals as signals_module
from betrace.tui.traces import ShownSpan, in_tree_order, spans_of
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.waterfall import MAX_SPANS, marks, waterfall
from tests.support import tui_records as records
from tests.support.tui_fake import piloted, refusal, screen_text, toasts, until


async def opened(pilot, api):
    await pilot.press("5")
    await until(lambda: bool(api.tails) and "● live" in shown(pilot, api))


def shown(pilot, api):
    pilot.app._show()
    return screen_text(pilot.app)


@piloted()
async def test_signals_are_listed_and_new_ones_appear(pilot, api):
    await opened(pilot, api)
    text = screen_text(pilot.app)
    assert "11-14 22:13:25 ✖ critical ✖  fraud-check" in text
    assert "Tried [bold]five" in text
    assert "○  retries" in text
    api.raise_signal({k: v for k, v in records.signal(30).items() if k != "status"})
    await until(lambda: "22:13:50" in shown(pilot, api))
    lines = screen_text(pilot.app).splitlines()
    assert lines[4].startswith("11-14 22:13:50")  # the newest is first, and the cursor follows
    assert pilot.app.panel.selected == records.signal(30)["id"]


@piloted()
async def test_the_cursor_stays_on_a_selected_signal(pilot, api):
    await opened(pilot, api)
    await pilot.press("j")
    chosen = pilot.app.panel.selected
    api.raise_signal(records.signal(30))
    await until(lambda: "22:13:50" in shown(pilot, api))
    assert pilot.app.panel.selected == chosen == records.signal(4)["id"]


@piloted()
async def test_a_retraction_changes_the_signal_it_retracts(pilot, api):
    await opened(pilot, api)
    raised = records.signal(5)
    again = {**raised, "id": "f" * 32, "kind": "retracted", "message": "It came after all"}
    del again["status"]
    api.raise_signal(again)
    await until(lambda: shown(pilot, api).count(" ○  fraud-check") == 2)


@pytest.mark.parametrize(
    ("key", "typed", "query"),
    [
        ("r", "retries", "rule=retries"),
        ("v", "critical", "severity=critical"),
        ("a", "retr", "status=retracted"),
    ],
)
def test_filters_are_sent_to_the_service(key, typed, query):
    @piloted()
    async def run(pilot, api):
        await opened(pilot, api)
        await pilot.press(key)
        await until(lambda: isinstance(pilot.app.screen, Pick))
        await pilot.press(*typed, "enter")
        lists = lambda: [  # noqa: E731
            str(each.url) for each in api.requests if each.url.path == "/api/v1/signals"
        ]
        await until(lambda: query in lists()[-1])
        await until(lambda: "live" in shown(pilot, api))
        assert query.replace("=", " ") in shown(pilot, api)
        await pilot.press("c")
        await until(lambda: query not in lists()[-1])

    run()


@piloted()
async def test_a_text_filters_the_rows_and_inverts(pilot, api):
    await opened(pilot, api)
    await pilot.press("slash", *"!fraud", "enter")
    await until(lambda: "fraud-check" not in screen_text(pilot.app))
    assert "A slow one" in screen_text(pilot.app)
    assert "/!fraud" in screen_text(pilot.app)


@piloted()
async def test_a_signal_opens_with_its_trace_and_marked_spans(pilot, api):
    await opened(pilot, api)
    await pilot.press("enter")
    await until(lambda: sum("█" in line for line in screen_text(pilot.app).splitlines()) == 4)
    assert isinstance(pilot.app.screen, Detail)
    lines = screen_text(pilot.app).splitlines()
    text = "\n".join(lines)
    assert "missing: fraud_check (5)" in text
    assert "◆a     1  charge.where(amount > 1000)" in text
    spans = [line for line in lines if "█" in line]
    marked = [line for line in spans if "◆" in line]
    assert len(marked) == 1
    assert "◆a     charge" in marked[0]
    assert "✖ attempt" in text
    await pilot.press("escape")
    assert not isinstance(pilot.app.screen, Detail)


@piloted()
async def test_a_missing_trace_is_reported(pilot, api):
    api.routes["GET", f"/api/v1/traces/{records.TRACE}"] = refusal(404, "there is no trace", "wait")
    await opened(pilot, api)
    await pilot.press("enter")
    await until(lambda: "✖ not loaded: there is no trace; wait" in screen_text(pilot.app))


@piloted()
async def test_a_lost_stream_is_reopened(pilot, api):
    await opened(pilot, api)
    first = set(api.tails)
    for tail in first:
        tail.put_nowait(None)
    await until(lambda: "stream lost" in shown(pilot, api))
    await until(lambda: bool(api.tails - first))


@piloted()
async def test_the_stream_is_closed_while_another_panel_is_shown(pilot, api):
    await opened(pilot, api)
    await pilot.press("1")
    await until(lambda: not api.tails)


@piloted()
async def test_another_tenant_is_chosen(pilot, api):
    await opened(pilot, api)
    await pilot.press("o")
    await until(lambda: isinstance(pilot.app.screen, Pick))
    await until(lambda: "acme" in screen_text(pilot.app))
    await pilot.press(*"acm", "enter")
    await until(lambda: "tenant acme" in shown(pilot, api) and bool(api.tails))
    asked = [each for each in api.requests if each.url.path == "/api/v1/signals"][-1]
    assert asked.headers["x-scope-orgid"] == "acme"
    await pilot.press("o")
    await until(lambda: isinstance(pilot.app.screen, Pick))
    await pilot.press(*"No!", "enter")
    await pilot.pause()
    assert "use 1 to 63 of" in screen_text(pilot.app)
    await pilot.press("escape")
    assert "acme @ " in screen_text(pilot.app)


@piloted()
async def test_older_signals_are_loaded_on_request(pilot, api):
    def page(request: httpx.Request) -> httpx.Response:
        old = "cursor" in request.url.params
        those = [records.signal(1, rule_id="old-one")] if old else records.signals()
        return httpx.Response(200, json={"signals": those, "next": None if old else "c1"})

    api.routes["GET", "/api/v1/signals"] = page
    await opened(pilot, api)
    await pilot.press("m")
    await until(lambda: "old-one" in shown(pilot, api))


@piloted()
async def test_the_number_of_signals_kept_is_bounded(pilot, api):
    await opened(pilot, api)
    panel = pilot.app.panel
    for number in range(1000):
        moment = f"2023-11-14T23:{number // 60 % 60:02}:{number % 60:02}.000000000Z"
        panel._received(records.signal(number + 100, detected_at=moment))
    assert len(panel._signals) <= 2 * signals_module.PAGE
    assert len(list(panel.rows(pilot.app.state))) == signals_module.PAGE


@piloted()
async def test_columns_fit_every_window(pilot, api):
    app = pilot.app
    await opened(pilot, api)
    await pilot.press("j")
    chosen = app.panel.selected
    for width, trace, status in ((80, False, False), (120, False, True), (149, False, True)):
        await pilot.resize_terminal(width, 30)
        await pilot.pause()
        table = app.panel.table
        assert table.virtual_size.width <= table.size.width
        text = screen_text(app)
        assert (records.TRACE in text) == trace
        assert ("✖  active" in text) == status
        assert "11-14 22:13:25" in text
        assert app.panel.selected == chosen
    await pilot.resize_terminal(80, 30)
    await pilot.pause()
    line = next(line for line in screen_text(app).splitlines() if "fraud-check" in line)
    assert line.endswith("…")
    assert len(line) <= 80


@piloted()
async def test_a_frozen_list_is_not_called_live(pilot, api):
    await opened(pilot, api)
    await pilot.press("p")
    await pilot.pause()
    assert "● live" not in screen_text(pilot.app)
    assert "▲ frozen" in screen_text(pilot.app)
    await pilot.press("p")
    await until(lambda: "● live" in screen_text(pilot.app))


@piloted()
async def test_a_lost_connection_does_not_claim_that_there_are_no_signals(pilot, api):
    api.routes["GET", "/api/v1/signals"] = {"signals": [], "next": None}
    await opened(pilot, api)
    await until(lambda: "No signals yet" in screen_text(pilot.app))
    api.go_away()
    await until(lambda: "No connection to the service." in screen_text(pilot.app))
    assert "No signals yet" not in screen_text(pilot.app)
    assert "● live" not in screen_text(pilot.app)


@piloted()
async def test_a_signal_fills_the_window(pilot, api):
    await opened(pilot, api)
    await pilot.press("enter")
    await until(lambda: isinstance(pilot.app.screen, Detail))
    await pilot.pause()
    lines = screen_text(pilot.app).splitlines()
    assert lines[0].startswith("╭")
    assert lines[0].endswith("╮")
    assert len(lines[0]) == 80
    assert lines[-2].startswith("╰")


# Waterfalls


def test_a_waterfall_gives_bars_the_space_that_names_do_not_need():
    spans = [span("a", start=0), ShownSpan("b", "a", "b", "s", 0, 500, False)]
    line = waterfall(in_tree_order(spans), {}, 200).plain.splitlines()[1]
    assert len(line) == 200
    assert line.count("█") > 150
    assert "0 µs" in line
    long = [ShownSpan("c", "", "n" * 90, "s", 0, 5, False)]
    assert "n" * 90 in waterfall(in_tree_order(long), {}, 200).plain


def span(identity: str, parent: str = "", start: int = 0) -> ShownSpan:
    return ShownSpan(identity, parent, identity, "s", start, start + 1, False)


def test_spans_follow_their_parents_and_cycles_appear_once():
    spans = [span("c", "b", 3), span("a", "", 1), span("b", "a", 2), span("d", "a", 1)]
    assert [(depth, each.id) for depth, each in in_tree_order(spans)] == [
        (0, "a"),
        (1, "d"),
        (1, "b"),
        (2, "c"),
    ]
    assert [each.id for _, each in in_tree_order([span("x", "y", 1), span("y", "x", 2)])] == [
        "x",
        "y",
    ]
    assert in_tree_order([span("lost", "gone")]) == [(0, span("lost", "gone"))]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef-"), st.integers(0, 10**15)),
        max_size=12,
    ),
    st.integers(20, 200),
)
def test_every_span_has_a_line_that_fits(given_spans, width):
    spans = [span(identity, parent, start) for identity, parent, start in given_spans]
    found = in_tree_order(spans)
    assert {each.id for _, each in found} == {each.id for each in spans}
    assert len(found) == len({each.id for each in spans})
    lines = waterfall(found, {"a": "a"}, width).plain.splitlines()
    assert len(lines) == max(1, len(found))
    if width >= 60:
        assert all(len(line) <= width for line in lines)


def test_a_large_trace_is_truncated():
    spans = [span(str(number)) for number in range(MAX_SPANS + 5)]
    assert waterfall(in_tree_order(spans), {}, 80).plain.endswith("… and 5 more spans")
    assert waterfall([], {}, 80).plain == "no spans"


def test_malformed_spans_are_omitted():
    odd = {"resourceSpans": [None, {"resource": 3, "scopeSpans": [{"spans": [{}, 7]}]}]}
    assert [each.start for each in spans_of(odd)] == [0]
    assert marks({"x": ["1", "2"], "y": ["2"], "z": []}) == {"1": "a", "2": "ab"}


@piloted()
async def test_a_list_that_cannot_be_loaded_is_reported(pilot, api):
    api.routes["GET", "/api/v1/signals"] = refusal(503, "the query took too long", "narrow it")
    await pilot.press("5")
    await until(lambda: bool(toasts(pilot.app)))
    assert "not loaded: the query took too long" in shown(pilot, api)


@piloted()
async def test_a_new_filter_starts_at_the_newest_signal(pilot, api):
    await opened(pilot, api)
    await pilot.press("G")
    assert pilot.app.panel.selected == records.signal(2)["id"]
    api.routes["GET", "/api/v1/signals"] = {
        "signals": [records.signal(number) for number in range(39, 9, -1)],
        "next": None,
    }
    pilot.app.panel.filter_by("severity", "critical")
    await until(lambda: len(pilot.app.panel._shown) == 30)
    assert pilot.app.panel.selected == records.signal(39)["id"]


@pytest.mark.parametrize(("number", "path"), [("5", "/api/v1/signals"), ("6", "/api/v1/rules")])
def test_an_operators_token_asks_for_a_tenant(number, path):
    def refuses(request: httpx.Request) -> httpx.Response:
        if "x-scope-orgid" in request.headers:
            return httpx.Response(200, json={"signals": records.signals(), "rules": []})
        return refusal(401, "the token is no JSON Web Token", "get a new one")

    @piloted()
    async def run(pilot, api):
        api.routes["GET", path] = refuses
        await pilot.press(number)
        await until(lambda: "no tenant chosen; press o" in shown(pilot, api))
        assert not toasts(pilot.app)
        pilot.app.post_message(ViewTenant("acme"))
        await until(lambda: "no tenant chosen" not in shown(pilot, api))

    run()
