"""Keys: panels, filter, sort, freeze, details, palette, help and window size."""

from __future__ import annotations

import asyncio

from textual.command import CommandPalette
from textual.events import Key
from textual.widgets import Input

from betrace.tui.panels import PANELS
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.dialogs import Confirm
from betrace.tui.widgets.help import Help
from betrace.tui.widgets.too_small import TooSmall
from tests.support.tui_fake import FakeApi, piloted, screen_text, snapshot_at, toasts, until


@piloted()
async def test_numbers_and_clicks_switch_panels(pilot, api):
    for number, panel in enumerate(PANELS, 1):
        await pilot.press(str(number))
        assert isinstance(pilot.app.panel, panel)
    await pilot.click("NavBar", offset=(3, 0))
    await pilot.pause()
    assert isinstance(pilot.app.panel, PANELS[0])


@piloted()
async def test_a_key_right_after_a_number_goes_to_the_new_panel(pilot, api):
    app = pilot.app
    for key in ("4", "W"):
        app.post_message(Key(key, key))
    await until(lambda: "Warm up the caches?" in screen_text(app))


@piloted()
async def test_a_filter_includes_rows_and_excludes_them_with_an_exclamation_mark(pilot, api):
    app = pilot.app
    await pilot.press("2", "slash", *"STO")
    assert list(app.panel._shown) == ["storage-write"]
    await pilot.press("enter")
    assert not app.query_one("#filter", Input).display
    assert "/STO" in screen_text(app)
    await pilot.press("slash", "home", "exclamation_mark", "enter")
    assert "storage-write" not in app.panel._shown
    assert len(app.panel._shown) == 4
    await pilot.press("escape")
    assert len(app.panel._shown) == 5
    await pilot.press("slash", *"nothing")
    await pilot.pause()
    assert "No row matches the filter" in screen_text(app)
    await pilot.press("escape")
    assert len(app.panel._shown) == 5


@piloted()
async def test_a_panel_without_rows_has_no_filter(pilot, api):
    await pilot.press("slash")
    assert not pilot.app.query_one("#filter", Input).display


@piloted()
async def test_columns_are_sorted_by_key_and_by_click(pilot, api):
    app = pilot.app
    await pilot.press("2", "s")
    assert list(app.panel._shown) == sorted(app.panel._shown)
    await pilot.press("S")
    assert list(app.panel._shown) == sorted(app.panel._shown, reverse=True)
    table = app.panel.table
    await pilot.click(table, offset=(72, 0))  # p99: figures are sorted descending first
    await pilot.pause()
    assert "p99▼" in screen_text(app)
    assert next(iter(app.panel._shown)) == "projection"
    await pilot.click(table, offset=(72, 0))
    await pilot.pause()
    assert next(iter(app.panel._shown)) == "span-ingestion"
    for _ in app.panel.COLUMNS:
        await pilot.press("s")
    assert next(iter(app.panel._shown)) == "span-ingestion"


@piloted()
async def test_the_cursor_stays_on_its_row_when_the_order_changes(pilot, api):
    await pilot.press("2", "j", "j")
    assert pilot.app.panel.selected == "rule-evaluation"
    await pilot.press("s")
    assert pilot.app.panel.selected == "rule-evaluation"
    await pilot.press("k", "G")
    assert pilot.app.panel.selected == "trace-correlation"
    await pilot.press("g")
    assert pilot.app.panel.selected == "projection"


@piloted()
async def test_a_frozen_view_stays_while_histories_grow(pilot, api):
    app = pilot.app
    await pilot.press("2", "p")
    before = screen_text(app)
    assert "FROZEN" in before
    data = snapshot_at(61)
    data["queues"][0]["utilizationPercent"] = 77.0
    api.publish(data)
    await until(lambda: app.state.now.stages[0].fill == 77.0)
    await pilot.pause()
    assert "77%" not in screen_text(app)
    await pilot.press("p")
    await until(lambda: "77%" in screen_text(app))
    assert "FROZEN" not in screen_text(app)


@piloted()
async def test_space_reads_the_state(pilot, api):
    app = pilot.app
    await pilot.press("2")
    api.data = snapshot_at(61)
    api.data["pipeline"]["ingestion"] = "paused"
    await pilot.press("space")
    await until(lambda: "ingestion ▲ paused" in screen_text(app))


DETAILS = [
    ("1", ("l", "enter"), "Stage trace-correlation", "p50 1.5 ms, p95 3.2 ms, p99 5.8 ms"),
    ("2", ("j", "j", "enter"), "Stage rule-evaluation", "blocked  no"),
    ("3", ("j", "enter"), "Breaker ledger", "55 % of 60 calls failed"),
    ("4", ("enter",), "Cache ruleContainers", "hit rate over time"),
]


@piloted()
async def test_enter_opens_and_escape_goes_back(pilot, api):
    app = pilot.app
    for number, keys, title, text in DETAILS:
        await pilot.press(number, *keys)
        await pilot.pause()
        assert isinstance(app.screen, Detail)
        assert title in screen_text(app)
        assert text in screen_text(app)
        api.publish()  # live updates must not close it
        await pilot.press("j", "k", "G", "g", "escape")
        assert len(app.screen_stack) == 1


@piloted()
async def test_a_detail_follows_the_state_and_says_when_its_object_is_gone(pilot, api):
    app = pilot.app
    await pilot.press("3", "j", "enter")
    data = snapshot_at(61)
    data["breakers"][1] |= {"state": "half_open", "trialsLeft": 7}
    api.publish(data)
    await until(lambda: "▲ half open" in screen_text(app))
    assert "7 trials left" in screen_text(app)
    data = snapshot_at(62)
    del data["breakers"][1]
    api.publish(data)
    await until(lambda: "This no longer exists." in screen_text(app))


@piloted()
async def test_help_lists_all_bindings(pilot, api):
    app = pilot.app
    await pilot.press("3", "question_mark")
    await pilot.pause()
    assert isinstance(app.screen, Help)
    text = str(app.screen._text())
    for words in ("Trip", "Reset", "Force open", "Filter", "Freeze", "Refresh", "Palette"):
        assert words in text
    for panel in PANELS:
        assert panel.TITLE in text
    assert text.lower().count("palette") == 1
    await pilot.press("j", "k", "escape")
    assert len(app.screen_stack) == 1


@piloted(read_only=True)
async def test_help_marks_actions_disabled_by_read_only(pilot, api):
    await pilot.press("3", "question_mark")
    assert "Trip: open it as if calls had failed (disabled: read-only)" in str(
        pilot.app.screen._text()
    )
    assert "Sort: sort by the next column\n" in str(pilot.app.screen._text())


@piloted()
async def test_the_palette_lists_all_actions_and_runs_them(pilot, api):
    app = pilot.app
    commands = {command.title for command in app.get_system_commands(app.screen)}
    assert {"Breakers: Trip", "Pipeline: Drain", "Caches: Warm up", "Freeze", "Theme"} <= commands
    await pilot.press("ctrl+p")
    await until(lambda: isinstance(app.screen, CommandPalette))
    await pilot.press(*"breakers reset")
    await pilot.pause(0.3)
    await pilot.press("enter")
    await until(lambda: isinstance(app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(app)))
    assert api.posted() == ["/api/admin/breakers/rule-evaluation/reset"]


@piloted(read_only=True)
async def test_the_palette_omits_changes_with_read_only(pilot, api):
    app = pilot.app
    commands = {command.title for command in app.get_system_commands(app.screen)}
    assert "Breakers: Trip" not in commands
    assert "Breakers: Sort" in commands


@piloted()
async def test_themes_are_switched(pilot, api):
    app = pilot.app
    await pilot.press("2")
    names = sorted(app.available_themes)
    app.theme = names[-1]
    await pilot.press("t")
    assert app.theme == names[0]
    for theme in sorted({"textual-ansi", "ansi-dark", "dracula"} & set(names)):
        app.theme = theme
        await pilot.pause()
        assert "span-ingestion" in screen_text(app)


@piloted()
async def test_a_small_window_shows_a_message_until_it_is_enlarged(pilot, api):
    app = pilot.app
    await pilot.press("2")
    await pilot.resize_terminal(60, 20)
    await pilot.pause()
    assert isinstance(app.screen, TooSmall)
    assert "The window is 60×20; BeTrace needs 80×24." in " ".join(screen_text(app).split())
    assert "span-ingestion" not in screen_text(app)
    await pilot.resize_terminal(79, 24)
    await pilot.resize_terminal(80, 24)
    await pilot.pause()
    assert "span-ingestion" in screen_text(app)


def test_a_small_window_at_the_start_shows_a_message():
    async def drive() -> None:
        app = FakeApi().app()
        async with app.run_test(size=(79, 40)) as pilot:
            await pilot.pause()
            assert isinstance(app.screen, TooSmall)
            await pilot.press("q")
        assert app.return_code == 0
        await app.client.close()

    asyncio.run(drive())


@piloted()
async def test_a_long_problem_is_wrapped(pilot, api):
    data = snapshot_at(61)
    data["components"]["breaker-ledger"] = {"status": "ok", "detail": "closed"}
    api.publish(data)
    await until(lambda: "all well" in screen_text(pilot.app))
    data = snapshot_at(62)
    data["components"]["breaker-ledger"] = {
        "status": "degraded",
        "detail": "forced_open by somebody who knew why and went home",
    }
    api.publish(data)
    await until(lambda: "went home" in screen_text(pilot.app))


@piloted()
async def test_a_problem_leads_to_its_panel(pilot, api):
    app = pilot.app
    data = snapshot_at(61)
    data["components"]["dead-letters"] = {"status": "degraded", "detail": "53 letters"}
    api.publish(data)
    await until(lambda: "7Dead▲ " in screen_text(app))
    line = next(line for line in screen_text(app).splitlines() if "breaker ledger: open" in line)
    y = screen_text(app).splitlines().index(line)
    await pilot.click(offset=(line.index("breaker ledger") + 1, y))
    await until(lambda: app.panel.TITLE == "Breakers")
    await pilot.resize_terminal(120, 40)
    await until(lambda: "Dead letters▲53" in screen_text(app))


@piloted()
async def test_a_tile_shows_maximum_and_period(pilot, api):
    lines = screen_text(pilot.app).splitlines()
    assert "last 29 s" in lines[2]
    assert "max 16.2k" in lines[4]
    await pilot.resize_terminal(200, 50)
    await pilot.pause()
    graph = [line[:50] for line in screen_text(pilot.app).splitlines()[4:12]]
    assert graph[0].rstrip().endswith("max 16.2k")
    assert max(line.count("█") for line in graph) == 30  # one column for each point
    assert sum("█" in line for line in graph) == 8


@piloted()
async def test_the_focused_button_of_a_question_stands_out(pilot, api):
    await pilot.press("3", "R")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.pause()
    cancel, confirm = (pilot.app.screen.query_one(f"#{name}") for name in ("cancel", "confirm"))
    assert cancel.has_focus
    focused, other = cancel.styles.background, confirm.styles.background
    assert focused != other
    await pilot.press("right")
    await pilot.pause()
    assert (cancel.styles.background, confirm.styles.background) == (other, focused)


@piloted()
async def test_the_footers_fit_80_columns(pilot, api):
    for number in range(1, len(PANELS) + 1):
        await pilot.press(str(number))
        await until(lambda: screen_text(pilot.app).rstrip().endswith("q Quit"))
        footer = screen_text(pilot.app).splitlines()[-1]
        assert ("⏎ Open" in footer) == (number < 9)
