"""Lists that a key opens: the alerts that fire now, and the traces that rules could not judge."""

from __future__ import annotations

from textual.content import Content

from betrace.tui.base import BaseApp
from betrace.tui.format import date, many, moment
from betrace.tui.json_values import Json, mapping, objects
from betrace.tui.tones import marked, severity, toned
from betrace.tui.widgets.detail import Detail

MOST = 200
"""Maximum number of rows."""


def show_alerts(app: BaseApp) -> None:
    """Show the tenant's alerts that fire now."""

    async def ask() -> None:
        answer = await app.client.get("/api/v1/alerts", limit=MOST)
        app.push_screen(Detail("Alerts that fire now", lambda *_: alerts_text(answer)))

    app.start(app.reporting(ask), "ask")


def show_undecided(app: BaseApp, rule_id: str | None = None) -> None:
    """Show the traces that a rule, or any rule of the tenant, could not judge."""

    async def ask() -> None:
        answer = await app.client.get("/api/v1/undecided", limit=MOST, rule=rule_id)
        title = "Undecided traces" + (f" of {rule_id}" if rule_id is not None else "")
        app.push_screen(Detail(title, lambda *_: undecided_text(answer)))

    app.start(app.reporting(ask), "ask")


def alerts_text(answer: Json) -> Content:
    """Alerts, each with its examples."""
    found = objects(answer.get("alerts"))
    if not answer.get("destinations"):
        return Content(
            "Nobody is alerted: [alerts] in the service's configuration names no destination."
        )
    if not found:
        return Content.assemble(marked("no alert fires", "good"))
    lines = []
    for alert in found:
        grade, tone = severity(str(alert.get("severity", "")))
        receivers = ", ".join(mapping(alert.get("delivered"))) or "nobody yet"
        lines += [
            Content.assemble(
                toned(grade, tone),
                (f"  {alert.get('rule_id')}", "bold"),
                f"  {many(alert.get('count', 0), 'trace')}",
            ),
            Content(
                f"  since {date(moment(alert.get('started')))}, "
                f"last {date(moment(alert.get('last')))}, known to {receivers}"
            ),
            *(
                Content.assemble(f"  {each.get('trace_id')}  ", toned(_line(each), "quiet"))
                for each in objects(alert.get("examples"))
            ),
            Content(""),
        ]
    more = int(answer.get("total") or 0) - len(found)
    return Content("\n").join([*lines, Content(f"and {more} more")] if more > 0 else lines[:-1])


def undecided_text(answer: Json) -> Content:
    """Traces with the rules that could not judge them, and the reasons."""
    lines = [
        Content.assemble(
            f"{date(moment(each.get('at')))}  {each.get('trace_id')}  ",
            (str(each.get("rule_id")), "bold"),
            f"\n  {each.get('reason')}",
        )
        for each in objects(answer.get("undecided"))
    ]
    if answer.get("next") is not None:
        lines.append(Content("There are more: betrace undecided --limit 10000"))
    return Content("\n").join(lines or [Content.assemble(marked("every trace was judged", "good"))])


def _line(example: Json) -> str:
    return " ".join(str(example.get("message", "")).split())
