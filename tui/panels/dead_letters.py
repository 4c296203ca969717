"""Dead letters: batches that failed for good; retrying and discarding them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.changes import OperatorChange
from betrace.tui.client import ApiClient, ClientError, segment
from betrace.tui.format import clock, count, date, duration, many, moment, number, size
from betrace.tui.json_values import Json, objects
from betrace.tui.state import ServiceState
from betrace.tui.tones import marked, toned
from betrace.tui.widgets.descriptions import Descriptions
from betrace.tui.widgets.detail import CachedText
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.list_panel import MOST, ListPanel, Part
from betrace.tui.widgets.table_panel import Cell, Column, Row

MARK = "✚"


class DeadLettersPanel(ListPanel):
    TITLE = "Dead letters"
    SHORT = "Dead"
    NOUN = "Dead letter"
    EMPTY = "No dead letters: no batch has failed for good."

    COLUMNS = (
        Column("mark", " ", 1),
        Column("id", "id", 5, right=True),
        Column("stage", "stage", 15),
        Column("tenant", "tenant", 12, narrow=9),
        Column("attempts", "tried", 5, right=True),
        Column("failed", "failed", 8),
        Column("retry", "next retry", 10),
        Column("error", "error", 12, flex=True),
        Column("weight", "items", 6, right=True, shown_from=120),
        Column("bytes", "size", 9, right=True, shown_from=120),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "mark", "Mark", tooltip="Mark the letter, or remove its mark"),
        Binding("X", "mark_all", "Mark all", tooltip="Mark all rows, or none"),
        Binding("R", "change_letters('retry')", "Retry", tooltip="Retry the marked letters"),
        Binding("D", "change_letters('discard')", "Discard", tooltip="Delete the marked letters"),
        Binding("A", "change_retry_all", "Retry all", tooltip="Retry all letters"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._letters: dict[str, Json] = {}
        self._more = False
        self._marked: set[str] = set()
        self._texts = Descriptions(self, self._described)

    async def read(self) -> None:
        answer = await self.betrace.client.get("/api/admin/dead-letters", limit=MOST)
        before = self._letters
        self._letters = {str(each.get("id")): each for each in objects(answer.get("deadLetters"))}
        for identity, letter in self._letters.items():
            if before.get(identity) != letter:
                self._texts.forget(identity)
        self._more = answer.get("next") is not None
        self._marked &= set(self._letters)

    def head(self) -> Sequence[Part]:
        text = many(len(self._letters), "oldest dead letter" if self._more else "dead letter")
        parts: list[Part] = [marked(text, "bad" if self._letters else "good")]
        if self._marked:
            parts += ["  ", (f"{MARK} {len(self._marked)} marked", "bold $warning")]
        return parts

    def rows(self, state: ServiceState) -> Iterable[Row]:
        now = self.betrace.clock()
        for identity, letter in self._letters.items():
            again, failed = moment(letter.get("next_retry")), moment(letter.get("last_failed"))
            yield Row(
                identity,
                (
                    Cell(MARK if identity in self._marked else " ", "busy"),
                    Cell(identity, order=float(identity) if identity.isdigit() else 0.0),
                    Cell(str(letter.get("stage", ""))),
                    Cell(str(letter.get("tenant", ""))),
                    Cell(number(letter.get("attempts")), order=letter.get("attempts") or 0),
                    Cell(clock(failed), order=failed or 0.0),
                    Cell(retry_text(again, now), order=again or 0.0),
                    Cell(" ".join(str(letter.get("error", "")).split())),
                    Cell(number(letter.get("weight")), order=letter.get("weight") or 0),
                    Cell(size(letter.get("bytes")), order=letter.get("bytes") or 0),
                ),
            )

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        if key not in self._letters:
            return None
        shown = self._texts.get(key)
        return shown.draw(state, width) if shown is not None else None

    def _described(self, key: str) -> DeadLetterText | None:
        letter = self._letters.get(key)
        return DeadLetterText(letter) if letter is not None else None

    # Keys

    def action_mark(self) -> None:
        if self.selected is not None:
            self._marked ^= {self.selected}
            self.show(self.betrace.state)
            self.table.action_cursor_down()

    def action_mark_all(self) -> None:
        shown = set(self._shown)
        self._marked = set() if shown <= self._marked else self._marked | shown
        self.show(self.betrace.state)

    def action_change_letters(self, action: str) -> None:
        """Change the marked letters, or the one under the cursor if none is marked."""
        chosen = sorted(self._marked, key=list(self._letters).index)
        if not chosen and self.selected is not None:
            chosen = [self.selected]
        if not chosen:
            return
        verb, after, note = _WAYS[action]
        what = f"dead letter {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} dead letters"
        items = sum(self._letters[each].get("weight") or 0 for each in chosen)
        self.betrace.change(
            OperatorChange(
                f"{verb} {what}?",
                verb,
                self._each(action, chosen),
                [(f"{many(len(chosen), 'letter')} with {many(items, 'item')}", "kept", after)],
                note,
            )
        )

    def _each(self, action: str, chosen: Sequence[str]) -> Callable[[], Awaitable[str]]:
        async def run() -> str:
            done = missing = 0
            for identity in chosen:
                try:
                    await self.betrace.client.dead_letter(action, identity)
                    done += 1
                except ClientError as error:
                    if error.status != 404:
                        raise ClientError(
                            error.kind,
                            f"stopped after {done} of {len(chosen)}: {error}",
                            error.status,
                        ) from error
                    missing += 1
            self._marked.clear()
            result = f"{done} {_DONE[action]}"
            gone = "was" if missing == 1 else "were"
            return f"{result}, {missing} {gone} already gone" if missing else result

        return run

    def action_change_retry_all(self) -> None:
        async def run() -> str:
            answer = await self.betrace.client.retry_dead_letters()
            self._marked.clear()
            return f"{answer.get('retried', 'all')} {_DONE['retry']}"

        known = f"{count(len(self._letters))}{' or more' if self._more else ''}"
        effects = [("letters", f"{known} kept", "sent back to their stages")]
        self.betrace.change(
            OperatorChange("Retry all dead letters?", "Retry all", run, effects, _WAYS["retry"][2])
        )


_WAYS = {
    "retry": (
        "Retry",
        "sent back to their stages",
        "A letter that fails again is kept, with one more attempt counted.",
    ),
    "discard": (
        "Discard",
        "deleted",
        "This cannot be undone. The contents will not be evaluated or recorded.",
    ),
}
_DONE = {"retry": "queued for retry", "discard": "discarded"}


def retry_text(at: float | None, now: float) -> str:
    """When the service retries a letter by itself."""
    if at is None:
        return "manual"
    return f"in {duration(at - now)}" if at > now else "now"


class DeadLetterText(CachedText):
    """A letter, with its payload once that is loaded."""

    def __init__(self, letter: Json) -> None:
        super().__init__()
        self.letter = letter
        self._problem = ""

    async def load(self, client: ApiClient) -> None:
        """Read the letter with its payload."""
        path = f"/api/admin/dead-letters/{segment(str(self.letter.get('id')))}"
        try:
            self.letter = await client.get(path)
        except ClientError as error:
            self._problem = str(error)
        self.changed()

    def make(self, width: int) -> Content:
        letter = self.letter
        again = moment(letter.get("next_retry"))
        lines = [
            fields(
                ("stage", str(letter.get("stage", ""))),
                ("tenant", str(letter.get("tenant", ""))),
                ("kind", str(letter.get("kind", ""))),
                ("error", toned(str(letter.get("error", "")), "bad")),
                ("transient", "yes" if letter.get("transient") else "no"),
                ("attempts", count(letter.get("attempts"))),
                ("first failed", date(moment(letter.get("first_failed")))),
                ("last failed", date(moment(letter.get("last_failed")))),
                ("next retry", "only manually" if again is None else date(again)),
                ("items", count(letter.get("weight"))),
                ("size", size(letter.get("bytes"))),
            ),
            Content(""),
            Content.assemble(("payload", "bold")),
        ]
        if "payload" in letter:
            text = json.dumps(letter["payload"], indent=2, ensure_ascii=False)
            lines.append(Content(text[:_MOST_TEXT]))
            if len(text) > _MOST_TEXT:
                lines.append(Content(f"… and {many(len(text) - _MOST_TEXT, 'more character')}"))
        else:
            status = marked(f"not loaded: {self._problem}", "bad") if self._problem else "loading …"
            lines.append(Content.assemble(status))
        return Content("\n").join(lines)


_MOST_TEXT = 50_000
