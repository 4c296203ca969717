"""A signal in full: its rule, the spans that broke it, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.events import Resize
from textual.geometry import Region

from betrace.tui.base import ShowPanel
from betrace.tui.changes import PREFIX
from betrace.tui.client import segment
from betrace.tui.panels.evidence import SignalText
from betrace.tui.panels.span_text import span_text, span_title
from betrace.tui.panels.triage import acknowledge, mute_or_unmute
from betrace.tui.panels.web import open_page
from betrace.tui.state import ServiceState
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.key_bar import KeyBar
from betrace.tui.widgets.live_text import LiveText
from betrace.tui.widgets.waterfall import MAX_SPANS

SPAN_FROM = 150
"""Windows of at least this width show the selected span beside the trace."""


class SignalScreen(Detail):
    """A signal, its trace, and in wide windows the selected span.

    Args:
      key: the id of the signal.
      text_of: returns a signal with its trace, which is loaded soon.
      neighbour: returns the signal before (-1) or after (1) another.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,backspace", "dismiss", "Back"),
        Binding("down,j", "span(1)", "Span below", show=False),
        Binding("up,k", "span(-1)", "Span above", show=False),
        Binding("pagedown,ctrl+d", "scroll('page_down')", "Page down", show=False),
        Binding("pageup,ctrl+u", "scroll('page_up')", "Page up", show=False),
        Binding("enter", "open_span", "Span"),
        Binding("n", "other(1)", "Next"),
        Binding("p", "other(-1)", "Prev"),
        Binding("A", "change_acknowledge", "Ack"),
        Binding("M", "change_mute", "Mute"),
        Binding("r", "rule", "Rule"),
        Binding("y", "copy('trace_id')", "Copy id"),
        Binding("Y", "copy('id')", "Copy signal", show=False),
        Binding("w", "web", "Page"),
    ]

    def __init__(
        self,
        key: str,
        text_of: Callable[[str], SignalText | None],
        neighbour: Callable[[str, int], str | None],
    ) -> None:
        super().__init__("", lambda *_: None)
        self._key = key
        self._text_of = text_of
        self._neighbour = neighbour
        self._selected = -1
        """The index of the selected span; -1 for none, at the top."""

    @property
    def _shown(self) -> SignalText | None:
        return self._text_of(self._key)

    def compose(self) -> ComposeResult:
        with Horizontal():
            with VerticalScroll(classes="detail"):
                yield LiveText(classes="signal-facts")
                yield LiveText(classes="signal-trace")
            with VerticalScroll(classes="detail signal-span"):
                yield LiveText(classes="span-text")
        yield KeyBar()

    def on_resize(self, event: Resize) -> None:
        self.query_one(".signal-span").display = event.size.width >= SPAN_FROM

    def show(self, state: ServiceState) -> None:
        shown = self._shown
        if shown is None or not self.query(".signal-facts"):  # not composed yet
            return
        self.query_one(".detail", VerticalScroll).border_title = Content(f"Signal {self._key}")
        self.query_one(".signal-facts", LiveText).draw(lambda _: shown.facts())
        self.query_one(".signal-trace", LiveText).draw(
            lambda width: shown.trace_text(width, self._selected)
        )
        side = self.query_one(".signal-span", VerticalScroll)
        if not side.display:
            return
        spans = shown.lines
        if self._selected >= 0 and spans:
            span = spans[min(self._selected, len(spans) - 1)][1]
            side.border_title = Content(f"Span {span.name}")
            text = span_text(span, shown.begun)
        else:
            side.border_title = "Span"
            text = Content("↑ and ↓ select a span.")
        self.query_one(".span-text", LiveText).draw(lambda _: text)

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Disable changes with --read-only."""
        return None if action.startswith(PREFIX) and self.betrace.read_only else True

    def action_span(self, step: int) -> None:
        """Select the span below or above, and keep it visible."""
        shown = self._shown
        count = min(len(shown.lines), MAX_SPANS) if shown is not None else 0
        scroll = self.query_one(".detail", VerticalScroll)
        if not count:
            scroll.scroll_relative(y=step, animate=False)
            return
        self._selected = max(-1, min(self._selected + step, count - 1))
        self.show(self.betrace.state)
        if self._selected < 0:
            scroll.scroll_home(animate=False)
            return
        top = self.query_one(".signal-trace").virtual_region.y
        line = Region(0, top + 1 + self._selected, 1, 1)
        scroll.scroll_to_region(line, animate=False, force=True)

    def action_open_span(self) -> None:
        shown = self._shown
        if shown is None or not shown.lines:
            return
        spans = [span for _, span in shown.lines]
        span = spans[max(0, self._selected)]
        text = span_text(span, shown.begun)
        self.betrace.push_screen(Detail(span_title(span, spans), lambda *_: text))

    def action_other(self, step: int) -> None:
        key = self._neighbour(self._key, step)
        if key is None:
            self.notify("This is the last one." if step > 0 else "This is the first one.")
            return
        self._key, self._selected = key, -1
        self.show(self.betrace.state)
        self.query_one(".detail", VerticalScroll).scroll_home(animate=False)

    def action_change_acknowledge(self) -> None:
        shown = self._shown
        if shown is not None:
            acknowledge(self.betrace, shown.signal, shown.acknowledged)

    def action_change_mute(self) -> None:
        shown = self._shown
        if shown is not None:
            mute_or_unmute(self.betrace, str(shown.signal.get("rule_id")))

    def action_rule(self) -> None:
        shown = self._shown
        if shown is not None:
            self.betrace.post_message(ShowPanel("RulesPanel", str(shown.signal.get("rule_id"))))

    def action_copy(self, name: str) -> None:
        shown = self._shown
        if shown is not None:
            text = str(shown.signal.get(name))
            self.app.copy_to_clipboard(text)
            self.notify(text, title="Copied", markup=False)

    def action_web(self) -> None:
        open_page(self.betrace, f"/signals/{segment(self._key)}")
