"""The last line: the keys."""

from __future__ import annotations

from textual.app import App
from textual.binding import Binding
from textual.content import Content
from textual.screen import Screen

from betrace.tui.widgets.live_text import LiveText

WIDE = 100
"""The keys are spaced out in windows of at least this width."""


class KeyBar(LiveText):
    """The keys of the focused widget, the panel and the application; a click presses one.

    When they do not fit, the last keys of the panel are omitted, because those of the application
    include the help, which lists all. Textual's `Footer` mounts a widget for each key again
    whenever the focus moves, which takes ten times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: list[tuple[Binding, bool, bool]] = []
        """Each key with whether it is enabled, and whether it is one of the application's."""

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def _changed(self, screen: Screen[object]) -> None:
        if not self.is_attached or screen is not self.screen:
            return
        active, seen = list[tuple[Binding, bool, bool]](), set[str]()
        for node, binding, enabled, _ in screen.active_bindings.values():
            if binding.show and binding.action not in seen:
                seen.add(binding.action)
                active.append((binding, enabled, isinstance(node, App)))
        if active != self._keys:
            self._keys = active
            self.draw(self._line)

    def _line(self, width: int) -> Content:
        gap = 2 if width >= WIDE else 1
        own = [self._key(key, enabled) for key, enabled, general in self._keys if not general]
        last = [self._key(key, enabled) for key, enabled, general in self._keys if general]
        line = _joined([*own, *last], gap)
        while own and line.cell_length > width:
            del own[-1]
            line = _joined([*own, Content("…"), *last], gap)
        return line

    def _key(self, binding: Binding, enabled: bool) -> Content:
        opening = f"[@click=app.simulate_key('{binding.key}')]" if enabled else "[dim]"
        return Content.from_markup(
            f"{opening}[$footer-key-foreground bold]$key[/] $text[/]",
            key=self.app.get_key_display(binding),
            text=binding.description,
        )


def _joined(keys: list[Content], gap: int) -> Content:
    return Content(" " * gap).join(keys)
