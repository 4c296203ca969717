"""What can be done about a signal: its screen, acknowledging, muting, and the overview."""

from __future__ import annotations

import pytest

from betrace.tui.panels import web
from betrace.tui.panels.evidence import counts_text, groups_text
from betrace.tui.panels.signal_screen import SignalScreen
from betrace.tui.panels.span_text import span_text
from betrace.tui.traces import attribute_text, spans_of
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.dialogs import Ask, Confirm
from betrace.tui.widgets.pick import Pick
from tests.support import tui_records as records
from tests.support.tui_fake import piloted, refusal, screen_text, snapshot_at, toasts, until

WIDE = (200, 50)


async def listed(pilot, api):
    await pilot.press("5")
    await until(lambda: bool(api.tails) and "fraud-check" in screen_text(pilot.app))


async def opened(pilot, api):
    await listed(pilot, api)
    await pilot.press("enter")
    await until(lambda: "POST /checkout" in screen_text(pilot.app))
    return pilot.app.screen


def handled(api):
    """The service lists the newest signal as acknowledged from now on."""
    found = {"at": "2023-11-14T22:13:21Z", "by": "ann", "note": "I look"}
    first, *others = records.signals()
    first["acknowledged"] = found
    api.routes["GET", "/api/v1/signals"] = {"signals": [first, *others]}
    api.routes["GET", f"/api/v1/signals/{first['id']}"] = first


@piloted()
async def test_a_signal_is_acknowledged_with_a_note(pilot, api):
    app = pilot.app
    await opened(pilot, api)
    await pilot.press("A")
    await until(lambda: isinstance(app.screen, Ask))
    handled(api)
    await pilot.press(*"I look", "enter")
    await until(lambda: bool(toasts(app)))
    identity = records.signal(5)["id"]
    assert api.posted() == [f"/api/v1/signals/{identity}/acknowledge"]
    assert api.sent(f"/api/v1/signals/{identity}/acknowledge") == {"note": "I look"}
    assert toasts(app)[0] == ("✔ done", "the signal of fraud-check is acknowledged")
    await until(lambda: "acknowledged by ann at 2023-11-14 22:13:21: I look" in screen_text(app))
    await pilot.press("escape")
    await until(lambda: "✖✓ fraud-check" in screen_text(app))


@piloted()
async def test_a_retraction_of_an_open_signal_is_shown(pilot, api):
    app = pilot.app
    await opened(pilot, api)
    retracted = records.signal(5, status="retracted")
    api.routes["GET", f"/api/v1/signals/{retracted['id']}"] = retracted
    again = records.signal(5, id="f" * 32, kind="retracted")
    del again["status"]
    api.raise_signal(again)
    await until(lambda: app._show() or "○ retracted" in screen_text(app))


@piloted()
async def test_a_signal_is_acknowledged_in_the_list(pilot, api):
    app = pilot.app
    await listed(pilot, api)
    await pilot.press("A")
    await until(lambda: isinstance(app.screen, Ask))
    await pilot.press("escape")
    await until(lambda: not isinstance(app.screen, Ask))
    assert api.posted() == []
    await pilot.press("A")
    await until(lambda: isinstance(app.screen, Ask))
    handled(api)
    await pilot.press("enter")
    await until(lambda: "✖✓ fraud-check" in screen_text(app))


@pytest.mark.parametrize("number", ["5", "6"])
def test_a_rule_is_muted_for_a_time_and_a_reason(number):
    @piloted()
    async def run(pilot, api):
        app = pilot.app
        await pilot.press(number)
        await until(lambda: "fraud-check" in screen_text(app))
        await pilot.press("M")
        await until(lambda: isinstance(app.screen, Ask))
        await pilot.press(*"soon", "enter")
        await until(lambda: "begin with a duration" in screen_text(app))
        await pilot.press(*["backspace"] * 4, *"2h", "enter")
        await until(lambda: "say why it is muted" in screen_text(app))
        await pilot.press(*" a move", "enter")
        await until(lambda: bool(toasts(app)))
        assert api.posted() == ["/api/v1/rules/fraud-check/mute"]
        sent = api.sent("/api/v1/rules/fraud-check/mute")
        assert sent == {"for": "2h", "reason": "a move"}
        assert toasts(app)[0][1] == "fraud-check is muted until 2023-11-15 00:13:20"

    run()


@piloted()
async def test_a_mute_is_shown_and_ended(pilot, api):
    app = pilot.app
    muted = records.rule("fraud-check", muted=records.MUTE)
    api.routes["GET", "/api/v1/rules"] = {"rules": [muted]}
    api.routes["GET", "/api/v1/rules/fraud-check"] = muted
    await pilot.press("6")
    await until(lambda: "● muted" in screen_text(app))
    await pilot.press("enter")
    await until(
        lambda: "▲ until 2023-11-15 00:13:20 by ann: the bank is migrating" in screen_text(app)
    )
    await pilot.press("escape", "M")
    await until(lambda: isinstance(app.screen, Confirm))
    await pilot.pause()
    assert "muted until 2023-11-15 00:13:20 → not muted" in screen_text(app)
    await pilot.press("y")
    await until(lambda: bool(toasts(app)))
    assert toasts(app)[0][1] == "fraud-check is no longer muted"
    sent = [each for each in api.requests if each.method == "DELETE"]
    assert [each.url.path for each in sent] == ["/api/v1/rules/fraud-check/mute"]


@piloted()
async def test_the_next_and_the_previous_signal_are_a_key_away(pilot, api):
    app = pilot.app
    await opened(pilot, api)
    await pilot.press("n")
    await until(lambda: "A slow one" in screen_text(app))
    await pilot.press("p")
    await until(lambda: "missing: fraud_check (5)" in screen_text(app))
    await pilot.press("p")
    await until(lambda: bool(toasts(app)))
    assert toasts(app)[0][1] == "This is the first one."
    await pilot.press("n", "escape")
    assert app.panel.selected == records.signal(4)["id"]


@piloted()
async def test_a_signal_leads_to_its_rule_and_a_rule_to_its_signals(pilot, api):
    app = pilot.app
    await listed(pilot, api)
    await pilot.press("j", "enter")
    await until(lambda: isinstance(app.screen, SignalScreen))
    await pilot.press("r")
    await until(lambda: app.panel.TITLE == "Rules" and app.panel.selected == "slow-checkout")
    assert len(app.screen_stack) == 1
    await pilot.press("i")
    await until(lambda: app.panel.TITLE == "Signals")
    await until(lambda: "rule slow-checkout" in screen_text(app))
    assert "rule=slow-checkout" in str(
        [each.url for each in api.requests if each.url.path == "/api/v1/signals"][-1]
    )


@piloted()
async def test_spans_are_selected_and_opened(pilot, api):
    app = pilot.app
    screen = await opened(pilot, api)
    await pilot.press("j", "down", "down", "down", "down", "down", "enter")
    await until(lambda: type(app.screen) is Detail)
    await pilot.pause()
    text = screen_text(app)
    assert "Span attempt (4 spans in the trace)" in text
    assert "service   payment" in text
    assert "status    ✖ error" in text
    await pilot.press("escape", *["k"] * 6)
    assert app.screen is screen
    assert screen._selected == -1
    await pilot.press("pagedown", "ctrl+u", "enter")  # without a selection, the root
    await until(lambda: type(app.screen) is Detail)
    await pilot.pause()
    assert "Span POST /checkout" in screen_text(app)


@piloted()
async def test_keys_before_the_trace_is_loaded_do_nothing(pilot, api):
    api.routes["GET", f"/api/v1/traces/{records.TRACE}"] = refusal(404, "there is no trace", "wait")
    await listed(pilot, api)
    await pilot.press("enter", "j", "k", "enter")
    assert isinstance(pilot.app.screen, SignalScreen)


@piloted(size=WIDE)
async def test_a_wide_window_shows_the_selected_span_beside_the_trace(pilot, api):
    app = pilot.app
    await opened(pilot, api)
    assert "↑ and ↓ select a span." in screen_text(app)
    await pilot.press("j", "j")
    await until(lambda: "Span order" in screen_text(app))
    assert "parent    00000000000000a1" in screen_text(app)
    await pilot.resize_terminal(80, 24)
    await until(lambda: "Span order" not in screen_text(app))


@piloted()
async def test_ids_and_the_address_of_the_page_are_copied(pilot, api):
    app = pilot.app
    await opened(pilot, api)
    await pilot.press("y")
    assert app.clipboard == records.TRACE
    await pilot.press("Y")
    assert app.clipboard == records.signal(5)["id"]
    await pilot.press("w")
    assert app.clipboard.endswith(f":8090/signals/{records.signal(5)['id']}")
    await pilot.press("escape", "j", "w")
    assert app.clipboard.endswith(f":8090/signals/{records.signal(4)['id']}")


@piloted()
async def test_a_graphical_browser_opens_the_page(pilot, api):
    opened_urls = []
    pilot.app.open_url = opened_urls.append
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            patch.delenv(name, raising=False)
        web.open_page(pilot.app, "/signals/1")
        assert opened_urls == []
        patch.setenv("DISPLAY", ":0")
        web.open_page(pilot.app, "/signals/2")
    assert opened_urls == ["http://betrace.test:8090/signals/2"]


@piloted(read_only=True)
async def test_read_only_disables_changes_of_a_signal(pilot, api):
    screen = await opened(pilot, api)
    await pilot.press("A", "M")
    assert pilot.app.screen is screen
    await pilot.press("escape", "A", "M", "6", "M")
    assert len(pilot.app.screen_stack) == 1
    assert api.posted() == []


@piloted()
async def test_signals_are_grouped_by_rule(pilot, api):
    app = pilot.app
    await listed(pilot, api)
    await pilot.press("b")
    await until(lambda: "by rule" in screen_text(app).splitlines()[2])
    text = screen_text(app)
    assert len(app.panel._shown) == 3
    assert "2 signals; Tried" in text
    await pilot.press("G", "A")  # a group is not one signal
    assert toasts(app)[0][1] == "Open the rule first, and choose one of its signals."
    api.raise_signal(records.signal(30, rule_id="retries"))
    await until(lambda: app._show() or "3 signals; Pay" in screen_text(app))
    assert app.panel.selected == "rule retries"
    await pilot.press("enter")
    await until(lambda: "rule retries" in screen_text(app))
    assert "by rule" not in screen_text(app).splitlines()[2]
    await pilot.press("b", "b")
    assert all(not key.startswith("rule ") for key in app.panel._shown)


# Beside the tables


@piloted(size=WIDE)
async def test_wide_windows_describe_the_row_under_the_cursor(pilot, api):
    app = pilot.app
    for number, text, then in (
        ("2", "Stage span-ingestion", "Stage trace-correlation"),
        ("3", "Breaker rule-evaluation", "55 % of 60 calls failed"),
        ("4", "Cache ruleContainers", "Cache publicKeys"),
        ("5", "missing: fraud_check (5)", "Signal 00000000000000000000000000000004"),
        ("6", "Finance control 4.2", "shop.yaml: written by hand"),
        ("7", '"fraud-check"', "Dead letter 2"),
        ("8", "5\u202f000 spans/s", "Tenant default"),
    ):
        await pilot.press(number)
        await until(lambda text=text: text in screen_text(app))
        await pilot.press("j")
        await until(lambda then=then: then in screen_text(app))
        assert len(app.screen_stack) == 1
    await pilot.press("5")
    await until(lambda: "POST /checkout" in screen_text(app))
    await pilot.press("b")
    await until(
        lambda: (
            "signals of retries shown here" in screen_text(app) or "1 signal" in screen_text(app)
        )
    )
    await pilot.resize_terminal(120, 40)
    await until(lambda: "shown here" not in screen_text(app))


# The overview


@piloted(size=(120, 50))
async def test_the_overview_shows_breaking_rules_and_latest_signals(pilot, api):
    app = pilot.app
    await until(lambda: "2 rules broken, 1 h" in screen_text(app))
    text = screen_text(app)
    assert "22:13:25 ✖ Payments over 1000" in text
    assert "22:13:22 ○ no longer broken: Not any more" in text
    lines = text.splitlines()
    y = next(n for n, line in enumerate(lines) if "│ retries" in line)
    await pilot.click(offset=(lines[y].index("retries") + 1, y))
    await until(lambda: "rule retries" in screen_text(app))
    await pilot.press("1", "r")
    await until(lambda: app.panel.TITLE == "Rules")
    await pilot.press("1", "i")
    await until(lambda: app.panel.TITLE == "Signals")


@piloted(size=(120, 50))
async def test_the_overview_says_why_it_has_no_signals(pilot, api):
    app = pilot.app
    api.routes["GET", "/api/v1/signals/summary"] = {"by_rule": {}}
    api.routes["GET", "/api/v1/signals"] = {"signals": []}
    await pilot.press("space")
    await until(lambda: "none in the last hour" in screen_text(app))
    api.routes["GET", "/api/v1/signals"] = refusal(401, "no valid token", "")
    await pilot.press("space")
    await until(lambda: "choose a tenant" in screen_text(app))
    assert not toasts(app)
    api.routes["GET", "/api/v1/signals"] = refusal(503, "too slow", "")
    await pilot.press("space")
    await until(lambda: toasts(app) == [("✖ refused", "too slow")])
    assert "not loaded: too slow" in screen_text(app)
    api.routes["GET", "/api/v1/signals"] = {"signals": records.signals()}
    await pilot.press("space")
    await until(lambda: "A slow one" in screen_text(app))
    api.routes["GET", "/api/v1/signals"] = refusal(503, "too slow", "")
    await pilot.press("space")
    await until(lambda: len(toasts(app)) > 1)
    assert "A slow one" in screen_text(app)  # what was read last is kept


@piloted(size=(120, 40))
async def test_more_breaking_rules_than_lines(pilot, api):
    many = {f"rule number {n}": 100 - n for n in range(30)}
    api.routes["GET", "/api/v1/signals/summary"] = {"by_rule": many}
    await pilot.press("space")
    await until(lambda: "30 rules broken, 1 h" in screen_text(pilot.app))


# Tenants that wait


@piloted()
async def test_a_tenant_that_waits_for_cpu_is_shown(pilot, api):
    app = pilot.app
    data = snapshot_at(61)
    waiting = {"spans": 1200, "bytes": 9, "seconds": 65.0, "cpuSeconds": 2.5}
    data["pipeline"]["backlog"] = {"acme": waiting}
    api.publish(data)
    await until(lambda: "8Tenants▲" in screen_text(app) and "tenant acme" in screen_text(app))
    await pilot.press("2")
    await until(lambda: "▲ waiting for CPU: acme" in screen_text(app))
    await pilot.press("8")
    await until(lambda: "▲ 1.2k" in screen_text(app))
    assert "1 waiting for CPU" in screen_text(app)
    await pilot.press("enter")
    await until(lambda: "waiting for 1 min 5 s" in screen_text(app))


# Texts


def test_groups_that_broke_a_rule():
    assert groups_text({}) == []
    lines = groups_text(
        {
            "broken": 3,
            "of": 7,
            "examples": [
                {"key": {"order_id": "17"}, "clause": "always", "spans": ["a1", "a2"]},
                {"key": {}, "clause": "never", "spans": []},
            ],
        }
    )
    assert [each.plain for each in lines] == [
        "",
        "broken by 3 of 7 groups",
        "✖ order_id 17  always  spans a1, a2",
        "✖ the whole trace  never  no spans",
    ]
    assert counts_text({}, {}).plain == "no counts"


def test_a_span_in_full():
    text = {"key": "sku", "value": {"stringValue": "A-113"}}
    raw = {
        "spanId": "a1",
        "name": "charge",
        "kind": 3,
        "startTimeUnixNano": "2000000",
        "endTimeUnixNano": "5000000",
        "status": {"code": 2, "message": "declined"},
        "attributes": [text],
        "events": [{"name": "retry", "timeUnixNano": "3000000", "attributes": [text]}],
        "links": [{"traceId": "t", "spanId": "s"}],
    }
    trace = {"resourceSpans": [{"scopeSpans": [{"spans": [raw]}]}]}
    text = span_text(spans_of(trace)[0], 1_000_000).plain
    for part in (
        "kind      client",
        "starts    1.0 ms after the trace",
        "status    ✖ declined",
        "Attributes\nsku  A-113",
        "Event retry, 1.0 ms after the start\nsku  A-113",
        "Link to t s\nnone",
        "Resource\nnone",
    ):
        assert part in text
    raw["kind"] = "SPAN_KIND_SERVER"
    assert "kind      server" in span_text(spans_of(trace)[0], 0).plain


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"stringValue": "a"}, "a"),
        ({"intValue": "7"}, "7"),
        ({"doubleValue": 0.5}, "0.5"),
        ({"boolValue": True}, "true"),
        ({"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": "x"}]}}, '[1, "x"]'),
        ({"kvlistValue": {"values": [{"key": "k", "value": {"intValue": 2}}]}}, '{"k": 2}'),
        ({}, "null"),
    ],
)
def test_values_of_attributes(value, text):
    assert attribute_text(value) == text


# Alerts and undecided traces

ALERT = {
    "rule_id": "fraud-check",
    "severity": "critical",
    "started": "2023-11-14T22:13:20.000000000Z",
    "last": "2023-11-14T22:13:25.000000000Z",
    "count": 7,
    "delivered": {},
    "examples": [{"trace_id": records.TRACE, "message": "Payments: missing: [bold]fraud"}],
}


@pytest.mark.parametrize("number", ["1", "5"])
def test_the_alerts_that_fire_are_listed(number):
    @piloted(size=WIDE)
    async def run(pilot, api):
        app = pilot.app
        await pilot.press(number)
        for answer, says in (
            ({"alerts": [], "total": 0, "destinations": []}, "Nobody is alerted"),
            ({"alerts": [], "total": 0, "destinations": ["alerts-webhook"]}, "no alert fires"),
            (
                {"alerts": [ALERT], "total": 3, "destinations": ["alerts-webhook"]},
                "known to nobody yet",
            ),
        ):
            api.routes["GET", "/api/v1/alerts"] = answer
            await pilot.press("f")
            await until(lambda: isinstance(app.screen, Detail))
            await until(lambda says=says: says in screen_text(app))
            text = screen_text(app)
            await pilot.press("escape")
            await until(lambda: not isinstance(app.screen, Detail))
        assert "7 traces" in text
        assert f"{records.TRACE}  Payments: missing: [bold]fraud" in text
        assert "and 2 more" in text

    run()


@piloted(size=WIDE)
async def test_undecided_traces_are_listed_of_all_rules_or_of_one(pilot, api):
    app = pilot.app
    record = {
        "trace_id": records.TRACE,
        "rule_id": "fraud-check",
        "reason": "it has more than 50000 spans",
        "at": "2023-11-14T22:13:25.000000000Z",
    }
    api.routes["GET", "/api/v1/undecided"] = {"undecided": [record], "next": "5"}
    await pilot.press("u")
    await until(lambda: "it has more than 50000 spans" in screen_text(app))
    assert "There are more" in screen_text(app)
    await pilot.press("escape", "6")
    await until(lambda: app.panel.selected == "fraud-check")
    api.routes["GET", "/api/v1/undecided"] = {"undecided": [], "next": None}
    await pilot.press("u")
    await until(lambda: "every trace was judged" in screen_text(app))
    assert "Undecided traces of fraud-check" in screen_text(app)
    queries = [str(r.url) for r in api.requests if r.url.path == "/api/v1/undecided"]
    assert ["rule=" in each for each in queries] == [False, True]


@piloted()
async def test_signals_are_filtered_by_service(pilot, api):
    app = pilot.app
    await listed(pilot, api)
    await pilot.press("e")
    await until(lambda: isinstance(app.screen, Pick))
    await pilot.press(*"front", "enter")
    shown = lambda: app._show() or screen_text(app).splitlines()[2]  # noqa: E731
    await until(lambda: "service frontend" in shown() and "● live" in shown())
    asked = [str(r.url) for r in api.requests if r.url.path == "/api/v1/signals"]
    assert "service=frontend" in asked[-1]
    streams = [str(r.url) for r in api.requests if r.url.path == "/api/v1/signals/stream"]
    assert "service=frontend" in streams[-1]
