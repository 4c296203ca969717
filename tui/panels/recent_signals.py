"""What the overview says about a tenant's signals: which rules break most, and the latest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from textual.content import Content

from betrace.tui.client import ApiClient, ClientError
from betrace.tui.format import bar, clock, cut, many, moment, number
from betrace.tui.json_values import Json, as_int, mapping, objects
from betrace.tui.tones import STYLES, severity, toned

LATEST = 50
"""Maximum number of signals read."""
_BAR = 12
_SAFE = re.compile(r"[\w.-]+")
"""Ids that can be the argument of a link."""


class RecentSignals:
    """A tenant's signals of the last hour."""

    def __init__(self) -> None:
        self._tenant = ""
        self._by_rule: Mapping[str, int] | None = None
        self._latest: Sequence[Json] = ()
        self._problem = "loading …"

    @property
    def title(self) -> str:
        """How many rules raised signals in the last hour, if that is known."""
        rules = many(len(self._by_rule), "rule") if self._by_rule else "Rules"
        return f"{rules} broken, 1 h"

    async def read(self, client: ApiClient) -> None:
        """Read them again. Raises :exc:`ClientError`, except without a tenant."""
        tenant = client.tenant
        if (tenant or "default") != self._tenant:
            self._tenant, self._by_rule, self._problem = tenant or "default", None, "loading …"
        try:
            summary = await client.get("/api/v1/signals/summary")
            answer = await client.get("/api/v1/signals", limit=LATEST)
        except ClientError as error:
            self._problem = f"not loaded: {error}"
            if tenant is None and error.status in (401, 403):
                self._by_rule, self._problem = None, "choose a tenant: press 5, then o"
                return
            raise
        if tenant == client.tenant:
            found = {name: as_int(n) for name, n in mapping(summary.get("by_rule")).items()}
            self._by_rule = dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))
            self._latest = objects(answer.get("signals"))

    def rules_text(self, width: int) -> Content:
        """The rules that raised most signals in the last hour, with their counts."""
        if self._by_rule is None:
            return Content.assemble(toned(self._problem, "quiet"))
        if not self._by_rule:
            return Content.assemble(toned("none in the last hour", "quiet"))
        most = max(self._by_rule.values())
        space = min(_BAR, width - 24) if width >= 32 else 0
        length = max(8, width - (space and space + 1) - 5)
        lines = []
        for name, count in self._by_rule.items():
            drawn = f" {bar(count / most, space)}" if space else ""
            text = f"{cut(name, length):<{length}}{number(count):>5}{drawn}"
            line = Content(text)
            if _SAFE.fullmatch(name):
                line = Content.from_markup(f"[@click=app.signals_of('{name}')]$text[/]", text=text)
            lines.append(line)
        return Content("\n").join(lines)

    def latest_text(self, width: int) -> Content:
        """The latest signals."""
        if self._by_rule is None:
            return Content.assemble(toned(self._problem, "quiet"))
        if not self._latest:
            return Content.assemble(toned("none yet", "quiet"))
        lines = []
        for signal in self._latest:
            grade, tone = severity(str(signal.get("severity", "")))
            retracted = signal.get("status") == "retracted"
            before = "no longer broken: " if retracted else ""
            text = " ".join(f"{before}{signal.get('message')}".split())
            head = f"{clock(moment(signal.get('detected_at')))} "
            style = STYLES["quiet" if retracted else tone]
            text = cut(text, max(1, width - len(head) - 2))
            lines.append(Content.assemble(head, (f"{grade[:1]} ", style), text))
        return Content("\n").join(lines)
