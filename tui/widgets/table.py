"""A panel that is a table: filtered, sorted by any column, and touched only where it changed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Static

from betrace.tui.state import State
from betrace.tui.widgets.grid import Grid
from betrace.tui.widgets.panel import VI_KEYS, Panel, matches
from betrace.tui.widgets.text import Tone

_GAP = " "
"""What keeps columns apart. The table's own padding would take twice that, and 80 characters are
few."""


@dataclass(frozen=True, slots=True)
class Column:
    """``width`` in characters, or as wide as needed. Figures are set ``right``."""

    key: str
    label: str
    width: int | None = None
    right: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows, in which tone, and what it is sorted by (else its text)."""

    text: str
    tone: Tone | None = None
    order: float | str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """``key`` is the row's identity, which the cursor stays on."""

    key: str
    cells: Sequence[Cell]

    @property
    def text(self) -> str:
        """What `/` looks at."""
        return " ".join(cell.text for cell in self.cells)


class TablePanel(Panel):
    """A panel with a table. A subclass declares ``COLUMNS`` and gives ``rows``.

    `Enter` calls ``drill(key)``. ``above`` and ``below`` are widgets around the table.
    """

    COLUMNS: ClassVar[tuple[Column, ...]] = ()
    EMPTY: ClassVar[str] = "nothing to show"
    FILTERS: ClassVar[bool] = True
    FOLLOWS_TOP: ClassVar[bool] = False
    """Whether the cursor stays on the first row, where it is there, rather than on what it has."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *VI_KEYS,
        Binding("s", "sort", "Sort", show=False, tooltip="Sort by the next column"),
        Binding("S", "reverse", "Reverse", show=False, tooltip="Turn the order round"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._sorted_by: int | None = None
        self._descending = False
        self._shown: dict[str, tuple[Cell, ...]] = {}
        self._from_top = False

    @abstractmethod
    def rows(self, state: State) -> Iterable[Row]:
        """All rows, in their own order."""

    def above(self) -> ComposeResult:
        yield from ()

    def below(self) -> ComposeResult:
        yield from ()

    def drill(self, key: str) -> None:
        """`Enter` on a row."""

    def compose(self) -> ComposeResult:
        yield from self.above()
        table = Grid()
        for column in self.COLUMNS:
            width = column.width and column.width + len(_GAP)
            table.add_column(self._label(column), width=width, key=column.key)
        yield table
        yield Static(self.EMPTY, classes="empty")
        yield from self.below()

    @property
    def table(self) -> Grid:
        return self.query_one(Grid)

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor."""
        return self.table.selected

    # Showing

    def show(self, state: State) -> None:
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
        self.set_class(not wanted, "-empty")

    def _changes(self, before: tuple[Cell, ...] | None, cells: tuple[Cell, ...]) -> dict[str, Text]:
        """What is not as it was, by column."""
        if cells is before:
            return {}
        olds: Iterable[Cell | None] = before or [None] * len(cells)
        return {
            column.key: self._text(new, column)
            for column, new, old in zip(self.COLUMNS, cells, olds, strict=True)
            if old is None or new.text != old.text or new.tone != old.tone
        }

    def _text(self, cell: Cell, column: Column) -> Text:
        style = self.betrace.style(cell.tone) if cell.tone else ""
        text = cell.text
        if column.width is not None and len(text) > column.width:
            text = text[: column.width - 1] + "…"
        return Text(_set(text, column) + _GAP, style=style, no_wrap=True)

    def _label(self, column: Column) -> Text:
        mark = ""
        if self._sorted_by is not None and self.COLUMNS[self._sorted_by] is column:
            mark = "▼" if self._descending else "▲"
        return Text(_set(column.label, column) + (mark or _GAP))

    def restyle(self) -> None:
        changed = {key: self._changes(None, cells) for key, cells in self._shown.items()}
        self.table.show_rows(list(self._shown), changed)

    def from_top(self) -> None:
        """What is shown next is something else: the cursor is on its first row, unless the row
        that it is on is there too."""
        self._from_top = True

    def filter_changed(self) -> None:
        self.from_top()
        self.show(self.betrace.state)

    # Keys

    def sort_by(self, column: int | None, descending: bool) -> None:
        """Sort by a column, or with None in the rows' own order."""
        self._sorted_by, self._descending = column, descending
        for each in self.COLUMNS:
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
        if event.column_index == self._sorted_by:
            self.action_reverse()
        else:
            self.sort_by(event.column_index, self.COLUMNS[event.column_index].right)

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if event.row_key.value is not None:
            self.drill(event.row_key.value)


def _set(text: str, column: Column) -> str:
    """Text on its side of the column. Rich would cut the gap off from what it sets right."""
    return text.rjust(column.width or 0) if column.right else text


def _key(table: Grid, name: str) -> Any:
    return next(key for key in table.columns if key.value == name)


def _order(cell: Cell) -> tuple[int, float, str]:
    """Figures before texts, so that a column may have both."""
    if isinstance(cell.order, int | float):
        return (0, float(cell.order), "")
    return (1, 0.0, (cell.order if isinstance(cell.order, str) else cell.text).casefold())
