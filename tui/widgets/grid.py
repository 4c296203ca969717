"""Textual's table with updates of single rows, and drawn in a tenth of the time.

Textual's own `DataTable` cannot insert a row at a position, and renders every cell again whenever
one changes. Here the order is a sort, and a line is built from the plain texts of its cells. Rows
are one line high, and the cursor selects whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.strip import Strip
from textual.widgets import DataTable

_FEW = 32
"""Maximum number of rows that are added or removed one by one, because each costs time proportional
to the table. Beyond it the table is filled again."""


class _CellText(Text):
    """The text of a cell, with the key of its row."""

    row: str = ""


class Grid(DataTable[Text]):
    """A table of rows identified by keys. Columns are added, with keys, before any row."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open")]

    def __init__(self) -> None:
        super().__init__(cursor_type="row", zebra_stripes=True, cell_padding=0)
        self._keys: list[str] = []

    @property
    def keys(self) -> Sequence[str]:
        """The keys of the rows, in the order shown."""
        return self._keys

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor."""
        return self._keys[self.cursor_row] if self.cursor_row < len(self._keys) else None

    def clear_all(self) -> None:
        """Remove all rows and columns."""
        self.clear(columns=True)
        self._keys = []

    def select(self, key: str | None) -> None:
        """Move the cursor to the row with this key, if there is one."""
        if key in self._keys:
            self.move_cursor(row=self._keys.index(key))

    def show_rows(
        self,
        order: Sequence[str],
        changed: Mapping[str, Mapping[str, Text]],
        follows_top: bool = False,
        from_top: bool = False,
    ) -> None:
        """Show exactly these rows in this order.

        ``changed`` maps keys to texts by column: all cells of a new row, and the changed cells of
        another. The cursor stays on its row, and the row stays at its line on the screen. With
        ``follows_top``, a cursor on the first row stays on the first row. If the cursor's row
        disappears, the cursor keeps its position, or with ``from_top`` moves to the first row.
        """
        cursor, at_top = self.cursor_row, follows_top and self.cursor_row == 0
        selected = None if at_top else self.selected
        anchor, offset = self._anchor(at_top)
        if list(order) != self._keys:
            self._change_rows(order, changed)
            places = {key: index for index, key in enumerate(order)}
            place = 0 if from_top else min(cursor, len(order) - 1)
            row = 0 if at_top else places.get(selected or "", place)
            if from_top and not row:
                anchor, offset = next(iter(order), None), 0
            # move_cursor would scroll to the cursor, away from where the user scrolled to.
            self.set_reactive(DataTable.cursor_coordinate, Coordinate(max(0, row), 0))
            self._scroll_back(places.get(anchor or ""), offset)
        else:
            self._update(changed)
        self.refresh()

    def _anchor(self, at_top: bool) -> tuple[str | None, int]:
        """The row that keeps its line on the screen, and that line: the cursor's row if it is
        visible, else the first visible row."""
        top = round(self.scroll_y)
        if not self._keys or (at_top and top == 0):
            return None, 0
        row = self.cursor_row
        if at_top or not top <= row < top + self.size.height - self.header_height:
            row = min(top, len(self._keys) - 1)
        return self._keys[row], row - top

    def _scroll_back(self, place: int | None, offset: int) -> None:
        if place is not None:
            y = max(0, place - offset)
            # The height does not include new rows yet, and would limit the position.
            self.scroll_to(y=y, animate=False, immediate=y <= self.max_scroll_y)

    def _change_rows(self, order: Sequence[str], changed: Mapping[str, Mapping[str, Text]]) -> None:
        wanted, before = set(order), set(self._keys)
        new, gone = [key for key in order if key not in before], before - wanted
        if len(new) + len(gone) > _FEW:
            kept = {key: self.get_row(key) for key in order if key in before}
            self.clear()
            for key in order:
                self._add(key, kept.get(key) or list(changed[key].values()))
        else:
            for key in new:
                self._add(key, changed[key].values())
            for key in gone:
                self.remove_row(key)
        self._update({key: cells for key, cells in changed.items() if key in before})
        self._keys = list(order)
        if self._keys:
            places = {key: index for index, key in enumerate(order)}
            first = self.ordered_columns[0].key
            self.sort(first, key=lambda cell: places[cell.row])

    def _add(self, key: str, cells: Iterable[Text]) -> None:
        self.add_row(*(_of_row(key, text) for text in cells), key=key)

    def _update(self, changed: Mapping[str, Mapping[str, Text]]) -> None:
        automatic = {key.value for key, column in self.columns.items() if column.auto_width}
        for key, cells in changed.items():
            for column, text in cells.items():
                self.update_cell(key, column, _of_row(key, text), update_width=column in automatic)

    def render_line(self, y: int) -> Strip:
        index = y - self.header_height + round(self.scroll_y)
        if y < self.header_height or index >= self.row_count:
            return super().render_line(y)
        base = self._style_of(index)
        over = Style(color=base.color) if index == self.cursor_row else Style.null()
        row = self.get_row(self.ordered_rows[index].key)
        segments = [
            Segment(
                set_cell_size(cell.plain, column.get_render_width(self)),
                base + Style.parse(str(cell.style)) + over,
            )
            for cell, column in zip(row, self.ordered_columns, strict=True)
        ]
        left = round(self.scroll_x)
        return Strip(segments).crop_extend(left, left + self.size.width, base).simplify()

    def _style_of(self, index: int) -> Style:
        """The style of a row, with the metadata that clicks need."""
        stripe = "datatable--odd-row" if index % 2 else "datatable--even-row"
        style = self.get_component_styles(stripe).rich_style
        if index == self.cursor_row:
            style += self.get_component_rich_style("datatable--cursor")
        return style + Style.from_meta({"row": index, "column": 0})


def _of_row(key: str, text: Text) -> Text:
    cell = _CellText(text.plain, style=text.style, no_wrap=True)
    cell.row = key
    return cell
