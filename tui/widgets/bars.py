"""The two lines at the top: the connection, and the panels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from textual.content import Content

from betrace.tui.widgets.basic import Live, marked
from betrace.tui.widgets.text import clock

if TYPE_CHECKING:
    from betrace.tui.app import BetraceApp


class StatusBar(Live):
    """How the connection is, whose data this is, and what holds it up."""

    def show(self, app: BetraceApp) -> None:
        link, now = app.connection.link, app.state.now
        parts: list[str | tuple[str, str]] = [("BeTrace ", "bold")]
        if link.status == "connecting":
            parts.append(marked("connecting", "busy"))
        elif link.status == "connected":
            parts.append(marked(f"connected since {clock(link.since)}", "good"))
            if link.polling:
                parts.append(" (polling)")
        else:
            wait = max(0, round(link.retry_at - app.clock()))
            again = f"retrying in {wait} s" if wait else "retrying"
            parts.append(marked(f"lost {clock(link.since)}, {again}", "bad"))
        if app.state.stale and now is not None:
            parts.append((f" STALE since {clock(now.at)}", "bold $warning"))
        if app.frozen_at is not None:
            parts.append((f" ❄ FROZEN {clock(app.frozen_at)}", "bold $warning"))
        if app.read_only:
            parts.append((" READ-ONLY", "bold $accent"))
        left = Content.assemble(*parts)
        right = app.client.url.removeprefix("http://")
        if app.client.tenant:
            right = f"{app.client.tenant} @ {right}"
        self.draw(lambda width: _justified(left, right, width))


def _justified(left: Content, right: str, width: int) -> Content:
    space = width - left.cell_length - len(right)
    if space < 2:
        return left.truncate(width, ellipsis=True)
    return Content.assemble(left, " " * space, (right, "$text-muted"))


class NavBar(Live):
    """The panels by number, the visible one marked; and the filter."""

    def __init__(self, titles: Sequence[tuple[str, str]]) -> None:
        """``titles`` are given long and short."""
        super().__init__()
        self._titles = titles
        self._chosen = 0
        self._filter = ""

    def on_mount(self) -> None:
        self.draw(self._panels)

    def choose(self, index: int) -> None:
        self._chosen = index
        self.draw(self._panels)

    def filter(self, text: str) -> None:
        self._filter = text
        self.draw(self._panels)

    def _panels(self, width: int) -> Content:
        room = width - (len(self._filter) + 3 if self._filter else 0)
        for titles, between, after in self._ways():
            content = self._line(titles, between, after)
            if content.cell_length <= room:
                break
        if self._filter:
            shown = Content.assemble((f" /{self._filter} ", "bold reverse $warning"))
            space = max(0, width - content.cell_length - shown.cell_length)
            content = Content.assemble(content, " " * space, shown)
        return content

    def _ways(self) -> Iterator[tuple[list[str], str, str]]:
        """Titles and gaps, from the widest to the narrowest."""
        long, short = ([each[n] for each in self._titles] for n in (0, 1))
        yield long, " ", "  "
        yield long, " ", " "
        yield long, "", " "
        yield short, "", " "
        yield [short[n] if n == self._chosen else "" for n in range(len(short))], "", " "

    def _line(self, titles: Sequence[str], between: str, after: str) -> Content:
        parts: list[Content | str] = []
        for index, title in enumerate(titles):
            style = "bold reverse" if index == self._chosen else ""
            link = f"@click=app.panel({index + 1})"
            text = f"{index + 1}{between}{title}"
            opening = f"[{style} {link}]" if style else f"[{link}]"
            parts += [Content.from_markup(f"{opening}{text}[/]"), after]
        return Content.assemble(*parts[:-1])
