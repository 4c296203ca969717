"""A panel with one table: filtered, sorted by any column, and updated cell by cell.

In a wide window, the row under the cursor is described beside the table.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.events import Resize
from textual.widgets import DataTable

from betrace.tui.format import cut
from betrace.tui.state import ServiceState
from betrace.tui.tones import Tone
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.grid import Grid
from betrace.tui.widgets.live_text import LiveText
from betrace.tui.widgets.panel import VI_KEYS, Panel
from betrace.tui.widgets.text_filter import matches

_GAP = " "
"""Separates columns. The table's own padding is twice as wide, too much for 80 columns."""

WIDE = 100
"""Windows of at least this width are wide."""

_SCROLLBAR = 1
"""Columns for the vertical scrollbar."""

SIDE_FROM = 150
"""Windows of at least this width have a description beside the table, at least `_SIDE` wide."""
_SIDE, _TABLE = 60, 110


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    key: str
    label: str
    width: int | None = None
    """In characters; None for as wide as its texts."""
    right: bool = False
    """Whether the text is aligned right, as figures are."""
    flex: bool = False
    """Whether the column takes the rest of the width, at least ``width``."""
    narrow: int | None = None
    """The width in windows narrower than `WIDE`; 0 hides the column there."""
    shown_from: int = 0
    """The column is hidden in windows narrower than this."""

    def width_in(self, window: int) -> int | None:
        """The width in a window; 0 if the column is hidden."""
        if window < self.shown_from:
            return 0
        return self.width if window >= WIDE or self.narrow is None else self.narrow


@dataclass(frozen=True, slots=True)
class Cell:
    """The text of a cell, its tone, and its sort key (by default the text)."""

    text: str
    tone: Tone | None = None
    order: float | str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """``key`` identifies the row; the cursor follows it."""

    key: str
    cells: Sequence[Cell]

    @property
    def text(self) -> str:
        """The text that `/` searches."""
        return " ".join(cell.text for cell in self.cells)


class TablePanel(Panel):
    """A panel with a table. A subclass declares ``COLUMNS`` and implements ``rows``.

    ``describe`` makes the text of a row, for `Enter` and for wide windows. ``above`` and ``below``
    yield widgets around the table.
    """

    NOUN: ClassVar[str] = ""
    """What a row is, such as Breaker. Descriptions begin with it."""
    COLUMNS: ClassVar[tuple[Column, ...]] = ()
    EMPTY: ClassVar[str] = "Nothing to show."
    FILTERS: ClassVar[bool] = True
    FOLLOWS_TOP: ClassVar[bool] = False
    """Whether a cursor on the first row stays on the first row when rows are inserted above it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *VI_KEYS,
        Binding("s", "sort", "Sort", show=False, tooltip="Sort by the next column"),
        Binding("S", "reverse", "Reverse", show=False, tooltip="Reverse the order"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._sorted_by: int | None = None
        self._descending = False
        self._shown: dict[str, tuple[Cell, ...]] = {}
        self._from_top = False
        self._widths: dict[str, int | None] = {}
        """The widths of the visible columns by key, in order."""
        self._wanted: str | None = None
        """The row that gets the cursor once it is there."""

    @abstractmethod
    def rows(self, state: ServiceState) -> Iterable[Row]:
        """All rows, in their default order."""

    def above(self) -> ComposeResult:
        yield from ()

    def below(self) -> ComposeResult:
        yield from ()

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        """Everything about a row in lines of this width; None when it no longer exists."""
        return None

    def title_of(self, key: str) -> str:
        """The title of a description."""
        return f"{self.NOUN} {key}"

    def drill(self, key: str) -> None:
        """`Enter` on a row."""
        self.betrace.push_screen(Detail(self.title_of(key), partial(self.describe, key)))

    def choose(self, key: str) -> None:
        """Move the cursor to a row, now or once it is there."""
        self._wanted = key
        self._select_wanted()

    def _select_wanted(self) -> None:
        if self._wanted is not None and self._wanted in self.table.keys:
            self.table.select(self._wanted)
            self._wanted = None

    def empty_text(self) -> str:
        """The text in place of an empty table."""
        if self.filter_text:
            return "No row matches the filter. Press esc to drop it."
        return "No connection to the service." if self.betrace.state.stale else self.EMPTY

    def compose(self) -> ComposeResult:
        window = self.app.size.width
        table = Grid()
        self._widths = self._widths_in(window - _side_width(window))
        self._add_columns(table)
        with Horizontal():
            with Vertical():
                yield from self.above()
                yield table
                yield LiveText(classes="empty")
                yield from self.below()
            with VerticalScroll(classes="side titled-box") as side:
                side.styles.width = _side_width(window)
                side.display = bool(_side_width(window))
                yield LiveText(classes="side-text")

    @property
    def table(self) -> Grid:
        return self.query_one(Grid)

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor."""
        return self.table.selected

    # Columns

    def _widths_in(self, window: int) -> dict[str, int | None]:
        widths = {column.key: column.width_in(window) for column in self.COLUMNS}
        widths = {key: width for key, width in widths.items() if width != 0}
        used = sum((width or 0) + len(_GAP) for width in widths.values())
        for column in self.COLUMNS:
            if column.flex and column.key in widths:
                least = widths[column.key] or 0
                widths[column.key] = max(least, least + window - _SCROLLBAR - used)
        return widths

    def _add_columns(self, table: Grid) -> None:
        for column in self._columns:
            width = self._widths[column.key]
            table.add_column(self._label(column), width=width and width + len(_GAP), key=column.key)

    @property
    def _columns(self) -> list[Column]:
        """The visible columns."""
        return [column for column in self.COLUMNS if column.key in self._widths]

    def on_resize(self, event: Resize) -> None:
        side = _side_width(event.size.width)
        if event.size.width:
            box = self.query_one(".side", VerticalScroll)
            box.styles.width, box.display = side, bool(side)
        widths = self._widths_in(event.size.width - side)
        if event.size.width and widths != self._widths:
            self._widths = widths
            selected = self.selected
            self._shown = {}
            self.table.clear_all()
            self._add_columns(self.table)
            self.show(self.betrace.state)
            self.table.select(selected)

    # Showing

    def show(self, state: ServiceState) -> None:
        rows = list(self.rows(state))
        if self.filter_text:
            rows = [row for row in rows if matches(row.text, self.filter_text)]
        if self._sorted_by is not None:
            column = self._sorted_by
            rows.sort(key=lambda row: _order(row.cells[column]), reverse=self._descending)
        wanted = {row.key: tuple(row.cells) for row in rows}
        changed = {
            key: texts
            for key, cells in wanted.items()
            if (texts := self._changes(self._shown.get(key), cells))
        }
        self._shown = wanted
        if changed or list(wanted) != self.table.keys:
            self.table.show_rows(list(wanted), changed, self.FOLLOWS_TOP, self._from_top)
        self._from_top = False
        self._select_wanted()
        self.set_class(not wanted, "-empty")
        self.query_one(".empty", LiveText).text(self.empty_text())
        self.show_side(state)

    def show_side(self, state: ServiceState) -> None:
        """Describe the row under the cursor beside the table, if the window is wide."""
        side = self.query_one(".side", VerticalScroll)
        if not side.display:
            return
        key = self.selected
        side.border_title = Content(self.title_of(key)) if key else ""
        nothing = Content("")
        self.query_one(".side-text", LiveText).draw(
            lambda width: (self.describe(key, state, width) if key else None) or nothing
        )

    def on_data_table_row_highlighted(self) -> None:
        self.show_side(self.betrace.state)

    def _changes(self, before: tuple[Cell, ...] | None, cells: tuple[Cell, ...]) -> dict[str, Text]:
        """The texts of the cells that changed, by column."""
        if cells is before:
            return {}
        olds: Iterable[Cell | None] = before or [None] * len(cells)
        return {
            column.key: self._text(new, column)
            for column, new, old in zip(self.COLUMNS, cells, olds, strict=True)
            if column.key in self._widths
            and (old is None or new.text != old.text or new.tone != old.tone)
        }

    def _text(self, cell: Cell, column: Column) -> Text:
        style = self.betrace.style(cell.tone) if cell.tone else ""
        width = self._widths[column.key]
        text = cell.text if width is None else cut(cell.text, width)
        return Text(_aligned(text, column, width) + _GAP, style=style, no_wrap=True)

    def _label(self, column: Column) -> Text:
        mark = ""
        if self._sorted_by is not None and self.COLUMNS[self._sorted_by] is column:
            mark = "▼" if self._descending else "▲"
        width = self._widths[column.key]
        label = column.label if width is None else column.label[:width]
        return Text(_aligned(label, column, width) + (mark or _GAP))

    def restyle(self) -> None:
        changed = {key: self._changes(None, cells) for key, cells in self._shown.items()}
        self.table.show_rows(list(self._shown), changed)

    def from_top(self) -> None:
        """Move the cursor to the first row with the next rows, unless its row is among them."""
        self._from_top = True

    def filter_changed(self) -> None:
        self.from_top()
        self.show(self.betrace.state)

    # Keys

    def sort_by(self, column: int | None, descending: bool) -> None:
        """Sort by the column with this index, or with None in the default order."""
        self._sorted_by, self._descending = column, descending
        for each in self._columns:
            self.table.columns[_key(self.table, each.key)].label = self._label(each)
        self.show(self.betrace.state)
        self.table.refresh()

    def action_sort(self) -> None:
        following = 0 if self._sorted_by is None else self._sorted_by + 1
        column = following if following < len(self.COLUMNS) else None
        self.sort_by(column, column is not None and self.COLUMNS[column].right)

    def action_reverse(self) -> None:
        if self._sorted_by is not None:
            self.sort_by(self._sorted_by, not self._descending)

    def action_vi(self, action: str) -> None:
        getattr(self.table, f"action_{action}")()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        column = self._columns[event.column_index]
        index = self.COLUMNS.index(column)
        if index == self._sorted_by:
            self.action_reverse()
        else:
            self.sort_by(index, column.right)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if event.row_key.value is not None:
            self.drill(event.row_key.value)


def _side_width(window: int) -> int:
    """The width of the description in a window; 0 in narrow ones."""
    return max(_SIDE, window - _TABLE) if window >= SIDE_FROM else 0


def _aligned(text: str, column: Column, width: int | None) -> str:
    """Text on its side of the column. Rich would cut the gap off text that it aligns right."""
    return text.rjust(width or 0) if column.right else text


def _key(table: Grid, name: str) -> Any:
    return next(key for key in table.columns if key.value == name)


def _order(cell: Cell) -> tuple[int, float, str]:
    """Figures before texts, so a column may contain both."""
    if isinstance(cell.order, int | float):
        return (0, float(cell.order), "")
    return (1, 0.0, (cell.order if isinstance(cell.order, str) else cell.text).casefold())
