"""The endpoint for traces that rules could not judge."""

from __future__ import annotations

from functools import partial
from typing import Any

from betrace.service.api.endpoint import Call, Endpoints
from betrace.service.api.node_cursors import make_cursor, read_cursor
from betrace.service.api.params import LIMIT, NEXT, Param, read_hex, read_integer, read_text
from betrace.service.times import write_time

endpoints = Endpoints("Signals and traces")

_HEX = {"type": "string", "pattern": "^[0-9a-fA-F]{32}$"}


@endpoints.add(
    "GET",
    "/api/v1/undecided",
    "Traces that a rule could not judge, newest first",
    params=(
        Param("rule", "Only of this rule (its id).", read_text),
        Param("trace_id", "Only of this trace, 32 hex digits.", read_hex(32), _HEX),
        LIMIT,
        Param("cursor", NEXT, read_integer(0, 2**63 - 1)),
    ),
    answers={
        200: '`{"undecided": [{"trace_id", "rule_id", "rule_version", "reason", "at"}], '
        '"next": cursor or null}`'
    },
)
async def list_undecided(call: Call) -> Any:
    """Nothing was raised or retracted for such a trace and rule. The newest 10 000 of a tenant are
    kept. A record stays when the trace is judged later, because late spans reopened it. In a
    cluster a cursor is for the query node that made it; others answer 400."""
    page = partial(
        call.tools.undecided.page,
        call.tenant,
        rule=call.params["rule"],
        trace_id=call.params["trace_id"],
        limit=call.params["limit"],
        before=read_cursor(call.tools.sources, call.params["cursor"]),
    )
    found, following = await call.blocking(page)
    return {
        "undecided": [
            {
                "trace_id": each.trace_id,
                "rule_id": each.rule_id,
                "rule_version": each.rule_version,
                "reason": each.reason,
                "at": write_time(each.at_ns),
            }
            for each in found
        ],
        "next": make_cursor(call.tools.sources, following),
    }
