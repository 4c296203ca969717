"""Trying a condition against a trace of the tenant."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from betrace.tui.client import ClientError, Json
from betrace.tui.panels.evidence import VerdictShown
from betrace.tui.widgets.basic import Detail
from betrace.tui.widgets.listing import objects
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.text import clock, many, millis, moment

if TYPE_CHECKING:
    from betrace.tui.app import BetraceApp

RECENT = 100
"""Traces to choose from."""

_TRACE = re.compile(r"[0-9a-fA-F]{32}")


def test_condition(app: BetraceApp, name: str, condition: str) -> None:
    """Ask for a trace, and show what the condition says of it."""

    async def test() -> None:
        answer = await app.client.get("/api/v1/traces", limit=RECENT)
        options = [_option(trace) for trace in objects(answer.get("traces"))]
        chosen = await app.push_screen_wait(
            Pick(f"Test {name} against which trace?", options, _check)
        )
        if chosen is None:
            return
        trace = await app.client.trace(chosen)
        try:
            verdict = await app.client.test_condition(condition, trace)
        except ClientError as error:
            raise _of_condition(error) from error
        app.push_screen(Detail(f"Test of {name}", VerdictShown(trace, verdict).draw))

    app.start(app.telling(test), "test")


def _option(trace: Json) -> tuple[str, str]:
    identity = str(trace.get("trace_id"))
    took = millis(float(trace.get("duration_ns") or 0) / 1e6)
    told = (
        f"{trace.get('root_service')} {trace.get('root_name')}, {many(trace.get('spans'), 'span')}"
    )
    errors = f", {many(trace['errors'], 'error')}" if trace.get("errors") else ""
    return identity, f"{clock(moment(trace.get('start')))} {told}, {took}{errors}  {identity}"


def _check(text: str) -> str:
    return "" if _TRACE.fullmatch(text) else "choose a trace, or write its id: 32 hex digits"


def _of_condition(error: ClientError) -> ClientError:
    """With where the first error is."""
    for fault in objects(error.detail.get("errors")):
        where = f"line {fault.get('line')}, column {fault.get('column')}"
        return ClientError(error.kind, f"{where}: {fault.get('message')}", error.status)
    return error
