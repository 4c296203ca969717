"""The second line: the panels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from textual.content import Content

from betrace.tui.tones import STYLES, SYMBOLS, Tone
from betrace.tui.widgets.live_text import LiveText

Badge = tuple[str, Tone]
"""A short text next to a title, such as the number of problems."""


class NavBar(LiveText):
    """The panels by number with the visible one highlighted, their badges, and the filter.

    Args:
      titles: (long, short) titles of the panels.
    """

    def __init__(self, titles: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._titles = titles
        self._chosen = 0
        self._filter = ""
        self._badges: Mapping[int, Badge] = {}

    def on_mount(self) -> None:
        self.draw(self._panels)

    def choose(self, index: int) -> None:
        self._chosen = index
        self.draw(self._panels)

    def filter(self, text: str) -> None:
        self._filter = text
        self.draw(self._panels)

    def badge(self, badges: Mapping[int, Badge]) -> None:
        """Show these badges, by the index of the panel."""
        if badges != self._badges:
            self._badges = badges
            self.draw(self._panels)

    def _panels(self, width: int) -> Content:
        available = width - (len(self._filter) + 3 if self._filter else 0)
        for titles, between, after, short_badges in self._variants():
            content = self._line(titles, between, after, short_badges)
            if content.cell_length <= available:
                break
        if self._filter:
            shown = Content.assemble((f" /{self._filter} ", "bold reverse $warning"))
            space = max(0, width - content.cell_length - shown.cell_length)
            content = Content.assemble(content, " " * space, shown)
        return content

    def _variants(self) -> Iterator[tuple[list[str], str, str, bool]]:
        """Titles, gaps and whether badges are shortened, from the widest to the narrowest."""
        long, short = ([each[n] for each in self._titles] for n in (0, 1))
        yield long, " ", "  ", False
        yield long, " ", " ", False
        yield long, "", " ", False
        yield short, "", " ", False
        yield short, "", " ", True
        yield [short[n] if n == self._chosen else "" for n in range(len(short))], "", " ", False

    def _line(self, titles: Sequence[str], between: str, after: str, short_badges: bool) -> Content:
        parts: list[Content | str | tuple[str, str]] = []
        for index, title in enumerate(titles):
            style = "bold reverse" if index == self._chosen else ""
            link = f"@click=app.panel({index + 1})"
            text = f"{(index + 1) % 10}{between}{title}"
            opening = f"[{style} {link}]" if style else f"[{link}]"
            parts.append(Content.from_markup(f"{opening}{text}[/]"))
            if index in self._badges:
                badge, tone = self._badges[index]
                text = SYMBOLS[tone] if short_badges else f"{SYMBOLS[tone]}{badge}"
                parts.append((text, f"bold {STYLES[tone]}"))
            parts.append(after)
        return Content.assemble(*parts[:-1])
