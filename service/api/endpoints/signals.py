"""Endpoints that read a tenant's signals and traces."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any

import trio

from betrace.service.api.backend import SignalQuery, TraceQuery
from betrace.service.api.endpoint import EVENTS_TYPE, KEEP_ALIVE, Answer, Call, Endpoints, event
from betrace.service.api.params import (
    CURSOR,
    LIMIT,
    SECOND,
    SINCE,
    UNTIL,
    Param,
    read_bool,
    read_choice,
    read_duration,
    read_hex,
    read_text,
    read_time,
    write_time,
)
from betrace.service.receiver.responses import ApiError

endpoints = Endpoints("Signals and traces")

SEVERITIES = ("critical", "high", "medium", "low", "info")
STATUSES = ("active", "retracted")
MAX_BUCKETS = 1000

RULE = Param("rule", "Of this rule (its id).", read_text)
SEVERITY = Param(
    "severity",
    "Of this severity.",
    read_choice(*SEVERITIES),
    {"type": "string", "enum": list(SEVERITIES)},
)
HEX_TRACE = {"type": "string", "pattern": "^[0-9a-fA-F]{32}$"}
TRACE_ID = Param("trace_id", "The trace's id, 32 hex digits.", read_hex(32), HEX_TRACE)
SIGNAL_ID = Param("id", "The signal's id, 32 hex digits.", read_hex(32), HEX_TRACE)


def signal_json(signal: dict[str, Any]) -> dict[str, Any]:
    """A signal with its time as text."""
    return {**signal, "detected_at": write_time(signal["detected_at"])}


def trace_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the trace index, or a trace, with its times as text."""
    times = {name: write_time(row[name]) for name in ("start", "end")}
    return {**row, **times}


@endpoints.add(
    "GET",
    "/api/v1/signals",
    "Signals, newest first",
    params=(
        RULE,
        SEVERITY,
        Param("trace_id", "Of this trace, 32 hex digits.", read_hex(32), HEX_TRACE),
        Param(
            "status",
            "Whether the breach still holds.",
            read_choice(*STATUSES),
            {"type": "string", "enum": list(STATUSES)},
        ),
        SINCE,
        UNTIL,
        LIMIT,
        CURSOR,
    ),
    answers={200: '`{"signals": […], "next": cursor or null}`'},
)
async def list_signals(call: Call) -> Any:
    """`next` is null when there are no more; else pass it as `cursor`, with the same filters."""
    given = call.params
    query = SignalQuery(
        given["rule"],
        given["severity"],
        given["trace_id"],
        given["status"],
        given["since"],
        given["until"],
        given["limit"],
        given["cursor"],
    )
    found, following = await call.blocking(call.backend.queries.signals, call.tenant, query)
    return {"signals": [signal_json(signal) for signal in found], "next": following}


@endpoints.add(
    "GET",
    "/api/v1/signals/stream",
    "Signals as they are stored, as server-sent events",
    params=(RULE, SEVERITY),
    answers={200: "Events named `signal`, whose data is a signal and whose id is its id"},
    media_type=EVENTS_TYPE,
)
async def stream_signals(call: Call) -> Answer:
    """From now on; read the list for those before. A comment comes every 15 s of silence. A
    client that is too slow misses signals."""
    rule, severity = call.params["rule"], call.params["severity"]

    async def events() -> AsyncIterator[bytes]:
        subscription = call.backend.subscribe_signals(call.tenant)
        try:
            while True:
                signal = None
                with trio.move_on_after(KEEP_ALIVE):
                    try:
                        signal = await subscription.receive()
                    except trio.EndOfChannel:
                        return
                if signal is None:
                    yield b": still here\n\n"
                elif rule in (None, signal["rule_id"]) and severity in (None, signal["severity"]):
                    yield event("signal", signal_json(signal), signal["id"])
        finally:
            subscription.close()

    return call.stream(events)


@endpoints.add(
    "GET",
    "/api/v1/signals/summary",
    "Counts of signals by rule, severity and time",
    params=(
        Param("since", "From this time on; an hour ago if left out.", read_time),
        Param("until", "Before this time; now if left out.", read_time),
        Param(
            "bucket",
            "Width of a bucket, such as `5m`; else a 60th of the time.",
            read_duration,
        ),
    ),
    answers={200: "`total`, `retracted`, `by_rule`, `by_severity` and `buckets`"},
)
async def summarise_signals(call: Call) -> Any:
    """What was raised, and how many of that was retracted since. Buckets begin at multiples of
    their width; those without signals are left out; at most 1000."""
    given = call.params
    until = given["until"] if given["until"] is not None else read_time("now")
    since = given["since"] if given["since"] is not None else max(until - 3600 * SECOND, 0)
    if since >= until:
        raise ApiError(400, "since is not before until", "exchange them")
    bucket = given["bucket"] or max((until - since) // 60, SECOND)
    if bucket < SECOND or (until - since) / bucket > MAX_BUCKETS:
        raise ApiError(
            400,
            f"bucket gives more than {MAX_BUCKETS} buckets or is under a second",
            "make bucket wider, or the time shorter",
        )
    rows = await call.blocking(
        call.backend.queries.signal_summary, call.tenant, since, until, bucket
    )
    by_rule: Counter[str] = Counter()
    by_severity: Counter[str] = Counter(dict.fromkeys(SEVERITIES, 0))
    buckets: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_rule[row.rule_id] += row.raised
        by_severity[row.severity] += row.raised
        buckets[row.bucket_ns][row.severity] += row.raised
    return {
        "since": write_time(since),
        "until": write_time(until),
        "bucket_seconds": bucket / SECOND,
        "total": sum(by_severity.values()),
        "retracted": sum(row.retracted for row in rows),
        "by_rule": dict(by_rule.most_common()),
        "by_severity": dict(by_severity),
        "buckets": [
            {"start": write_time(start), "total": sum(counts.values()), "by_severity": dict(counts)}
            for start, counts in sorted(buckets.items())
        ],
    }


@endpoints.add(
    "GET",
    "/api/v1/signals/{id}",
    "A signal with its evidence",
    path_params=(SIGNAL_ID,),
    answers={200: "The signal", 404: "There is no such signal"},
)
async def get_signal(call: Call) -> Any:
    signal = await call.blocking(call.backend.queries.signal, call.tenant, call.params["id"])
    if signal is None:
        raise ApiError(404, f"there is no signal {call.params['id']}", "list them: /api/v1/signals")
    return signal_json(signal)


@endpoints.add(
    "GET",
    "/api/v1/traces",
    "Recent traces, newest first",
    params=(
        Param("service", "With a span of this service.", read_text),
        Param("name", "Whose root span has this name.", read_text),
        Param("min_duration", "At least this long, such as `250ms`.", read_duration),
        SINCE,
        Param("has_signal", "With signals, or without.", read_bool, {"type": "boolean"}),
        LIMIT,
        CURSOR,
    ),
    answers={200: '`{"traces": […], "next": cursor or null, "searched_to": time or null}`'},
)
async def list_traces(call: Call) -> Any:
    """Traces appear when they are closed. A search through millions of traces that takes long stops
    before the page is full: then `searched_to` says back to which start of a trace it got, and
    `next` goes on from there. It is null for a full page and for the last."""
    given = call.params
    query = TraceQuery(
        given["service"],
        given["name"],
        given["min_duration"],
        given["since"],
        given["has_signal"],
        given["limit"],
        given["cursor"],
    )
    found, following, searched_to = await call.blocking(
        call.backend.queries.traces, call.tenant, query
    )
    return {
        "traces": [trace_json(row) for row in found],
        "next": following,
        "searched_to": None if searched_to is None else write_time(searched_to),
    }


@endpoints.add(
    "GET",
    "/api/v1/traces/{trace_id}",
    "A trace as OTLP JSON, its signals, its verdict by rule",
    path_params=(TRACE_ID,),
    answers={
        200: "`resourceSpans` (OTLP JSON), `state`, `signals`, `verdicts`, `missing`, `omitted`",
        404: "There is no such trace",
    },
)
async def get_trace(call: Call) -> Any:
    """`state` is `open` or `closed`. The spans are read from the span log: `missing` says how many
    of the requests that had some are damaged or no longer there, `omitted` how many were too many
    to show. `verdicts` are those of the present rules, by id: `verdict` is `breach` (with
    `clause`, and the id of the `signal` if there is one), `kept`, `open` (the trace is) or
    `unknown` (spans are missing)."""
    trace_id = call.params["trace_id"]
    trace = await call.blocking(call.backend.queries.trace, call.tenant, trace_id)
    if trace is None:
        raise ApiError(
            404,
            f"there is no trace {trace_id}",
            "a trace appears moments after its first span was accepted",
        )
    return {**trace_json(trace), "signals": [signal_json(s) for s in trace["signals"]]}
