"""The first line: the connection, the tenant and the modes of the view."""

from __future__ import annotations

from textual.content import Content

from betrace.tui.base import BaseApp
from betrace.tui.connection import Link
from betrace.tui.format import clock
from betrace.tui.tones import marked
from betrace.tui.widgets.live_text import LiveText


class StatusBar(LiveText):
    """The status of the connection, and whether the view is stale, frozen or read-only."""

    def show(self, app: BaseApp, link: Link) -> None:
        now = app.state.now
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
