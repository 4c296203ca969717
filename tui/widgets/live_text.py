"""Text that follows the state."""

from __future__ import annotations

from collections.abc import Callable

from textual.content import Content
from textual.events import Resize
from textual.widgets import Static

Draw = Callable[[int], Content]
"""Makes the text for a width."""


class LiveText(Static):
    """Text that is drawn for the widget's width, and painted only when it changed."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__("", id=id, classes=classes)
        self._draw: Draw | None = None
        self._drawn: Content | None = None

    def draw(self, draw: Draw) -> None:
        """Use this function from now on, also when the widget is resized."""
        self._draw = draw
        self._paint()

    def text(self, *parts: str | tuple[str, str] | Content) -> None:
        """Show these parts at any width."""
        content = Content.assemble(*parts)
        self.draw(lambda _: content)

    def on_resize(self, event: Resize) -> None:
        self._paint()

    def _paint(self) -> None:
        width = self.content_size.width
        if self._draw is None or not width:
            return
        content, before = self._draw(width), self._drawn
        if before is None or content.plain != before.plain or content.spans != before.spans:
            layout = before is None or _height(content, width) != _height(before, width)
            self._drawn = content
            self.update(content, layout=layout)
            if before is None:  # Textual may lose a layout that is requested during the first one
                self.call_after_refresh(self.refresh, layout=True)


def _height(content: Content, width: int) -> int:
    """Lines of the wrapped text."""
    return len(content.wrap(width))
