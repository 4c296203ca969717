"""Testing a condition on a trace of the tenant."""

from __future__ import annotations

import re

from betrace.tui.base import BaseApp
from betrace.tui.client import ClientError
from betrace.tui.format import clock, many, millis, moment
from betrace.tui.json_values import Json, objects
from betrace.tui.panels.evidence import VerdictText
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.pick import Pick

RECENT = 100
"""Number of traces offered."""

_TRACE = re.compile(r"[0-9a-fA-F]{32}")


def test_condition(app: BaseApp, name: str, condition: str) -> None:
    """Ask for a trace, and show the verdict of the condition on it."""

    async def test() -> None:
        answer = await app.client.get("/api/v1/traces", limit=RECENT)
        options = [_option(trace) for trace in objects(answer.get("traces"))]
        chosen = await app.push_screen_wait(Pick(f"Test {name} on which trace?", options, _check))
        if chosen is None:
            return
        trace = await app.client.trace(chosen)
        try:
            verdict = await app.client.test_condition(condition, trace)
        except ClientError as error:
            raise _of_condition(error) from error
        app.push_screen(Detail(f"Test of {name}", VerdictText(trace, verdict).draw))

    app.start(app.reporting(test), "test")


def _option(trace: Json) -> tuple[str, str]:
    identity = str(trace.get("trace_id"))
    took = millis(float(trace.get("duration_ns") or 0) / 1e6)
    summary = (
        f"{trace.get('root_service')} {trace.get('root_name')}, {many(trace.get('spans'), 'span')}"
    )
    errors = f", {many(trace['errors'], 'error')}" if trace.get("errors") else ""
    return identity, f"{clock(moment(trace.get('start')))} {summary}, {took}{errors}  {identity}"


def _check(text: str) -> str:
    return "" if _TRACE.fullmatch(text) else "pick a trace, or type its id of 32 hex digits"


def _of_condition(error: ClientError) -> ClientError:
    """The error with the location of the first fault."""
    for fault in objects(error.detail.get("errors")):
        where = f"line {fault.get('line')}, column {fault.get('column')}"
        return ClientError(error.kind, f"{where}: {fault.get('message')}", error.status)
    return error
