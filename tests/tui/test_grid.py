"""The table: updates of single rows keep the cursor and the scroll position."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text
from textual.app import App, ComposeResult

from betrace.tui.widgets.grid import Grid
from tests.support.examples import examples
from tests.support.tui_fake import until

HEIGHT = 10
"""Lines of the window, including the header."""


class Window(App[None]):
    CSS = "Grid { height: 1fr; }"

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str | None] = []

    def on_data_table_row_selected(self, event: Grid.RowSelected) -> None:
        self.opened.append(event.row_key.value)

    def compose(self) -> ComposeResult:
        grid = Grid()
        grid.add_column("name", width=8, key="name")
        grid.add_column("what", key="what")
        yield grid


def texts(keys, what: str = "") -> dict[str, dict[str, Text]]:
    return {key: {"name": Text(key), "what": Text(what or f"of {key}")} for key in keys}


def names(first: int, last: int) -> list[str]:
    return [f"row-{number}" for number in range(first, last)]


def lines(grid: Grid) -> list[str]:
    """The visible lines without the header."""
    return [grid.render_line(y).text.rstrip() for y in range(1, grid.size.height)]


def first_words(grid: Grid) -> list[str]:
    return [line.split()[0] for line in lines(grid) if line]


@asynccontextmanager
async def window(rows: list[str]) -> Iterator[tuple]:
    app = Window()
    async with asyncio.timeout(60), app.run_test(size=(40, HEIGHT)) as pilot:
        grid = app.query_one(Grid)
        grid.show_rows(rows, texts(rows))
        await pilot.pause()
        yield grid, pilot


def on_a_window(rows: list[str]):
    """Run a test with a table of these rows."""

    def decorate(test):
        async def drive() -> None:
            async with window(rows) as (grid, pilot):
                await test(grid, pilot)

        def run() -> None:
            asyncio.run(drive())

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate


@on_a_window(names(0, 5))
async def test_rows_are_added_removed_and_moved(grid, pilot):
    order = ["row-4", "new", "row-0", "row-2"]
    grid.show_rows(order, texts(["new"]) | {"row-0": {"what": Text("another")}})
    assert first_words(grid) == order
    assert lines(grid)[2] == "row-0   another"
    assert grid.keys == order
    grid.show_rows([], {})
    await pilot.pause()
    assert lines(grid) == [""] * (HEIGHT - 1)
    assert grid.selected is None


@on_a_window(names(0, 100))
async def test_the_row_under_the_cursor_keeps_its_line(grid, pilot):
    grid.move_cursor(row=50)
    await pilot.pause()
    line = first_words(grid).index("row-50")
    for number in range(5):  # a few are inserted above it, as signals are
        grid.show_rows([f"new-{number}", *grid.keys], texts([f"new-{number}"]))
        await pilot.pause()
        assert grid.selected == "row-50"
        assert first_words(grid).index("row-50") == line
    grid.show_rows(list(reversed(grid.keys)), {})
    await pilot.pause()
    assert grid.selected == "row-50"
    assert first_words(grid).index("row-50") == line
    more = [f"more-{number}" for number in range(200)]  # the table is filled again
    grid.show_rows([*more, *grid.keys], texts(more))
    await pilot.pause()
    await until(lambda: "row-50" in first_words(grid))
    assert grid.selected == "row-50"
    assert first_words(grid).index("row-50") == line


@on_a_window(names(0, 100))
async def test_the_scroll_position_stays_when_the_cursor_is_elsewhere(grid, pilot):
    grid.scroll_to(y=40, animate=False, immediate=True)  # with the mouse wheel
    await pilot.pause()
    assert first_words(grid)[0] == "row-40"
    for follows_top in (True, False):
        key = f"new-{follows_top}"
        grid.show_rows([key, *grid.keys], texts([key]), follows_top)
        await pilot.pause()
        assert first_words(grid)[0] == "row-40"
        assert grid.selected == "new-True"


@on_a_window(names(0, 100))
async def test_a_cursor_on_the_first_row_stays_first_with_follows_top(grid, pilot):
    grid.show_rows(["new", *grid.keys], texts(["new"]), follows_top=True)
    await pilot.pause()
    assert grid.selected == "new"
    assert first_words(grid)[0] == "new"
    grid.show_rows(["newer", *grid.keys], texts(["newer"]))
    await pilot.pause()
    assert grid.selected == "new"


@on_a_window(names(0, 20))
async def test_a_cursor_whose_row_disappears_keeps_its_position(grid, pilot):
    grid.move_cursor(row=3)
    grid.show_rows([key for key in grid.keys if key != "row-3"], {})
    assert grid.selected == "row-4"
    grid.show_rows(grid.keys[:2], {})
    assert grid.selected == "row-1"


@on_a_window(names(0, 3))
async def test_a_click_selects_a_row_and_a_second_click_opens_it(grid, pilot):
    await pilot.click(grid, offset=(20, 3))
    assert grid.selected == "row-2"
    assert pilot.app.opened == []
    await pilot.click(grid, offset=(2, 3))  # in another column of it
    await pilot.pause()
    assert pilot.app.opened == ["row-2"]


@on_a_window(["日本語日本語", "row"])
async def test_wide_characters_take_two_columns(grid, pilot):
    assert grid.render_line(1).cell_length == grid.size.width
    assert lines(grid)[0] == "日本語日of 日本語日本語"
    await pilot.press("l")
    grid.scroll_to(x=3, animate=False, immediate=True)
    assert grid.render_line(1).cell_length == grid.size.width


KEYS = st.lists(st.sampled_from([f"k{n}" for n in range(60)]), unique=True)


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(st.tuples(KEYS, st.integers(0, 59)), min_size=1, max_size=6))
def test_any_sequence_of_updates_shows_the_requested_rows(steps):
    async def drive() -> None:
        async with window([]) as (grid, pilot):
            before: set[str] = set()
            for step, (order, cursor) in enumerate(steps):
                known = before & set(order)
                changed = texts(set(order) - before)
                changed |= {key: {"what": Text(f"in {step}")} for key in known}
                selected = grid.selected
                grid.show_rows(order, changed)
                assert [row.key.value for row in grid.ordered_rows] == order == grid.keys
                for key in order:
                    wanted = f"in {step}" if key in known else f"of {key}"
                    assert [cell.plain for cell in grid.get_row(key)] == [key, wanted]
                if selected in known:
                    assert grid.selected == selected
                before = set(order)
                if order:
                    grid.move_cursor(row=cursor % len(order))
            await pilot.pause()

    asyncio.run(drive())


@pytest.mark.parametrize("rows", [0, 1])
def test_lines_below_the_rows_are_empty(rows):
    @on_a_window(names(0, rows))
    async def run(grid, pilot):
        assert [bool(line) for line in lines(grid)] == [True] * rows + [False] * (9 - rows)

    run()
