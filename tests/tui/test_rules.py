"""Rules: listing, editing, checking and testing."""

from __future__ import annotations

import pytest
from textual.widgets import Input, TextArea

from betrace.tui.panels.rule_edit import RuleEditor, difference, error_text
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.dialogs import Confirm
from betrace.tui.widgets.highlight import highlighted, tokens
from betrace.tui.widgets.pick import Pick
from tests.support import tui_records as records
from tests.support.tui_fake import piloted, refusal, screen_text, toasts, until


@piloted()
async def test_rules_are_listed_with_their_signals(pilot, api):
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    text = screen_text(pilot.app)
    assert "3 rules, 2 enabled, ▪ 1 in files  9 signals in the last hour" in text
    line = next(line for line in text.splitlines() if "fraud-check" in line)
    assert line.split()[:7] == ["●", "on", "fraud-check", "✖", "critical", "12", "7"]
    assert "○ off      slow-checkout" in text
    await pilot.press("enter")
    await pilot.pause()
    assert "when   { charge.where(amount > 1000) }" in screen_text(pilot.app)
    assert "team=payments" in screen_text(pilot.app)
    await pilot.press("escape")


@piloted()
async def test_how_a_rule_is_decided_is_shown(pilot, api):
    plan = "reads a trace back when it closes, if it has: charge"
    api.routes["POST", "/api/v1/rules/validate"] = {"valid": True, "errors": [], "plan": plan}
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    await pilot.press("enter")
    await until(lambda: f"decided           {plan}" in screen_text(pilot.app))
    await pilot.press("escape", "E")
    await until(lambda: isinstance(pilot.app.screen, RuleEditor))
    await until(lambda: plan in screen_text(pilot.app))


@piloted()
async def test_a_rule_in_shadow_mode_says_so(pilot, api):
    rule = records.rule("fraud-check", mode="shadow", incomplete="skip")
    api.routes["GET", "/api/v1/rules"] = {"rules": [rule]}
    await pilot.press("6")
    await until(lambda: "● shadow   fraud-check" in screen_text(pilot.app))
    await pilot.press("enter")
    await until(lambda: "shadow: its signals are recorded" in screen_text(pilot.app))
    assert "traces with a parent that never came are skipped" in screen_text(pilot.app)


@piloted()
async def test_a_rule_of_a_file_is_marked_and_cannot_be_changed(pilot, api):
    await pilot.press("6")
    await until(lambda: "▪ retries" in screen_text(pilot.app))
    screen = pilot.app.screen
    await pilot.press("down")
    await pilot.pause()
    assert footer(screen) == {"Edit": False, "On/off": False, "Delete": False, "Add": True}
    before = len(api.requests)
    await pilot.press("E", "X", "D")
    await pilot.pause()
    assert pilot.app.screen is screen
    assert not [each for each in api.requests[before:] if "/rules/retries" in each.url.path]
    await pilot.press("enter")
    await pilot.pause()
    assert "shop.yaml: written by hand, edit it there" in screen_text(pilot.app)
    await pilot.press("escape", "question_mark")
    await pilot.pause()
    assert "Edit: edit the rule (disabled: not for this row)" in screen_text(pilot.app)
    await pilot.press("escape", "up")
    await pilot.pause()
    assert footer(screen) == {"Edit": True, "On/off": True, "Delete": True, "Add": True}


@piloted()
async def test_a_rule_that_has_moved_to_a_file_is_not_changed(pilot, api):
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    moved = records.rule("fraud-check", editable=False, source="shop.yaml")
    api.routes["GET", "/api/v1/rules/fraud-check"] = moved
    await pilot.press("X")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✖ refused", "fraud-check is in the file shop.yaml")]


def footer(screen):
    """Whether each key in the footer that concerns a rule is enabled."""
    return {
        each.binding.description: each.enabled
        for each in screen.active_bindings.values()
        if each.binding.description in ("Edit", "On/off", "Delete", "Add")
    }


async def edited(pilot, key="E"):
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    await pilot.press(key)
    await until(lambda: isinstance(pilot.app.screen, RuleEditor))
    await pilot.pause()
    return pilot.app.screen


@piloted()
async def test_an_edited_rule_is_saved_with_its_entity_tag(pilot, api):
    screen = await edited(pilot)
    await until(lambda: "● the condition is valid" in screen_text(pilot.app))
    screen.query_one(TextArea).text = "never { bypass }\n"
    screen.query_one("#rule-severity", Input).value = "high"
    await pilot.press("ctrl+s")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.pause()
    text = screen_text(pilot.app)
    assert "severity: critical → high" in text
    assert "condition: 2 lines → 1 line" in text
    assert "+ never { bypass }" in text
    assert pilot.app.focused.id == "cancel"
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app)[0][0] == "✔ done"
    assert api.posted() == ["/api/v1/rules/fraud-check"]
    assert api.sent("/api/v1/rules/fraud-check") == {
        "name": "What fraud-check is about",
        "description": "Finance control 4.2",
        "severity": "high",
        "labels": {"team": "payments"},
        "condition": "never { bypass }\n",
        "enabled": True,
    }
    put = next(each for each in api.requests if each.method == "PUT")
    assert put.headers["if-match"] == '"fraud-check-1"'
    await until(lambda: not isinstance(pilot.app.screen, RuleEditor))


KEPT = {
    "mode": "shadow",
    "incomplete": "skip",
    "examples": [{"name": "x", "expect": "kept", "spans": ["a"]}],
}


@piloted()
async def test_what_the_editor_does_not_show_is_kept(pilot, api):
    api.routes["GET", "/api/v1/rules/fraud-check"] = records.rule("fraud-check", **KEPT)
    screen = await edited(pilot)
    await until(lambda: "● the condition is valid" in screen_text(pilot.app))
    screen.query_one("#rule-severity", Input).value = "high"
    await pilot.press("ctrl+s")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.pause()
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    sent = api.sent("/api/v1/rules/fraud-check")
    assert {name: sent[name] for name in KEPT} == KEPT


@piloted()
async def test_switching_a_rule_off_keeps_the_rest(pilot, api):
    whole = records.rule("fraud-check", **KEPT)
    api.routes["GET", "/api/v1/rules/fraud-check"] = whole
    api.routes["GET", "/api/v1/rules"] = {"rules": [whole]}
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    await pilot.press("X")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.pause()
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    sent = api.sent("/api/v1/rules/fraud-check")
    assert {name: sent[name] for name in KEPT} == KEPT
    assert sent["enabled"] is False


@piloted()
async def test_a_conflict_is_reported_and_keeps_the_edits(pilot, api):
    api.routes["PUT", "/api/v1/rules/fraud-check"] = refusal(
        412, "the rule fraud-check was changed", "read it again"
    )
    screen = await edited(pilot)
    screen.query_one(TextArea).text = "never { bypass }\n"
    await pilot.press("ctrl+s")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✖ conflict", "the rule fraud-check was changed; read it again")]
    assert pilot.app.screen is screen
    assert screen.query_one(TextArea).text == "never { bypass }\n"


@piloted()
async def test_errors_are_shown_while_typing_and_prevent_saving(pilot, api):
    fault = {"line": 1, "column": 3, "message": "found '&&'", "hint": "use 'and'"}
    screen = await edited(pilot)
    api.routes["POST", "/api/v1/rules/validate"] = {"valid": False, "errors": [fault]}
    before = api.calls.count(("POST", "/api/v1/rules/validate"))
    screen.query_one(TextArea).focus()
    await pilot.press("x", "y", "z")
    await until(lambda: "✖ line 1, column 3: found '&&'; use 'and'" in screen_text(pilot.app))
    assert api.calls.count(("POST", "/api/v1/rules/validate")) <= before + 2  # not at every key
    await pilot.press("ctrl+s")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app)[0] == ("✖ not saved", "line 1, column 3: found '&&'; use 'and'")
    assert api.posted() == []


@piloted()
async def test_a_check_while_the_editor_closes_does_nothing(pilot, api):
    screen = await edited(pilot)
    await screen.query(".rule-editor").remove()  # widgets are removed before their screen
    before = api.calls.count(("POST", "/api/v1/rules/validate"))
    await screen._check()
    assert api.calls.count(("POST", "/api/v1/rules/validate")) == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("severity", "urgent", "severity: 'urgent' is unknown"),
        ("labels", "team", "labels: 'team' is not a label"),
    ],
)
def test_an_invalid_field_is_reported(field, value, message):
    @piloted()
    async def run(pilot, api):
        screen = await edited(pilot)
        screen.query_one(f"#rule-{field}", Input).value = value
        await pilot.press("ctrl+s")
        await until(lambda: bool(toasts(pilot.app)))
        assert toasts(pilot.app)[0][1].startswith(message)
        assert api.posted() == []

    run()


@piloted()
async def test_a_new_rule_is_created_without_an_entity_tag(pilot, api):
    screen = await edited(pilot, "A")
    assert screen.query_one(TextArea).text == ""
    await until(lambda: "write a condition" in screen_text(pilot.app))
    assert "Example:" in screen_text(pilot.app)
    await pilot.press("ctrl+s")
    await until(lambda: bool(toasts(pilot.app)))
    assert "id: a rule needs an id" in toasts(pilot.app)[0][1]
    screen.query_one("#rule-id", Input).value = "new-one"
    await pilot.press("ctrl+s")
    await until(lambda: len(toasts(pilot.app)) > 1)
    assert toasts(pilot.app)[1] == ("✖ not saved", "write a condition first")
    assert api.posted() == []
    screen.query_one(TextArea).text = "never { bypass }"
    await pilot.press("ctrl+s")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: len(toasts(pilot.app)) > 2)
    put = next(each for each in api.requests if each.method == "PUT")
    assert put.url.path == "/api/v1/rules/new-one"
    assert "if-match" not in put.headers
    assert "name" not in api.sent("/api/v1/rules/new-one")


@piloted()
async def test_edits_are_not_discarded_without_a_question(pilot, api):
    screen = await edited(pilot)
    await pilot.press("escape")  # nothing was edited
    await until(lambda: not isinstance(pilot.app.screen, RuleEditor))
    screen = await edited(pilot)
    screen.query_one(TextArea).text = "never { a }"
    await pilot.press("escape")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("enter")  # Cancel
    await until(lambda: pilot.app.screen is screen)
    await pilot.press("escape")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: not isinstance(pilot.app.screen, RuleEditor | Confirm))


@piloted(read_only=True)
async def test_a_rule_is_tested_on_a_recent_trace(pilot, api):
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    await pilot.press("T")
    await until(lambda: isinstance(pilot.app.screen, Pick))
    await pilot.pause()
    assert "frontend POST /checkout, 4 spans" in screen_text(pilot.app)
    await pilot.press("down", "up", "pagedown", "enter")
    await until(lambda: isinstance(pilot.app.screen, Detail))
    await pilot.pause()
    text = screen_text(pilot.app)
    assert "✖ violated" in text
    assert "◆a     charge" in text
    sent = api.sent("/api/v1/rules/test")
    assert sent["condition"] == records.rules()[0]["condition"]
    assert sent["trace"] == {"resourceSpans": records.trace()["resourceSpans"]}


@piloted()
async def test_a_condition_with_errors_cannot_be_tested(pilot, api):
    answer = refusal(400, "the rule has errors", "see there")
    api.routes["POST", "/api/v1/rules/test"] = answer
    await edited(pilot)
    await pilot.press("ctrl+t")
    await until(lambda: isinstance(pilot.app.screen, Pick))
    await pilot.press(*"nothing like this", "enter")
    await pilot.pause()
    assert "type its id of 32 hex digits" in screen_text(pilot.app)
    await pilot.press(*["backspace"] * 20)
    await pilot.press("enter")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app)[0][1].startswith("the rule has errors")


@piloted()
async def test_a_deleted_rule_is_reported(pilot, api):
    api.routes["GET", "/api/v1/rules/fraud-check"] = refusal(404, "there is no rule", "list them")
    await pilot.press("6")
    await until(lambda: "fraud-check" in screen_text(pilot.app))
    await pilot.press("X")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✖ refused", "there is no rule; list them")]


def test_tokens_of_the_language():
    text = 'when { a.always.where(x >= 1.5s and "y" matches "z\\"//") } // never\nalways { b }'
    kinds = [(text[start:end], kind) for start, end, kind in tokens(text)]
    assert kinds == [
        ("when", "clause"),
        ("where", "keyword"),
        ("1.5s", "number"),
        ("and", "keyword"),
        ('"y"', "string"),
        ("matches", "keyword"),
        ('"z\\"//"', "string"),
        ("// never", "comment"),
        ("always", "clause"),
    ]
    assert highlighted("[b]never[/b]").plain == "[b]never[/b]"


def test_differences_and_errors_as_text():
    assert difference("a\nb\n", "a\nc\n") == "- b\n+ c"
    assert difference("", "\n".join("x" * 20)).endswith("… and 10 more lines")
    assert error_text({"message": "it is too long", "line": None}) == "it is too long"
