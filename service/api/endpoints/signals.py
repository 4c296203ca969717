"""Endpoints that read a tenant's signals and traces."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import orjson
import trio

from betrace.service.api.endpoint import EVENTS_TYPE, KEEP_ALIVE, Answer, Call, Endpoints, event
from betrace.service.api.errors import ApiError
from betrace.service.api.params import (
    CURSOR,
    LIMIT,
    SINCE,
    UNTIL,
    Param,
    read_bool,
    read_choice,
    read_hex,
    read_text,
)
from betrace.service.api.rendering import (
    acknowledgement_json,
    linked,
    signal_json,
    signals_json,
    trace_row_json,
)
from betrace.service.config.edge import Api
from betrace.service.rules.definition import ALERT, SEVERITIES, SHADOW
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.duck.search import TraceFilter
from betrace.service.times import SECOND, read_duration, read_time, write_time

endpoints = Endpoints("Signals and traces")

STATUSES = ("active", "retracted")
MAX_BUCKETS = 1000
MAX_NOTE = 500

RULE = Param("rule", "Only signals of this rule (its id).", read_text)
SEVERITY = Param(
    "severity",
    "Only signals of this severity.",
    read_choice(*SEVERITIES),
    {"type": "string", "enum": list(SEVERITIES)},
)
MODE = Param(
    "mode",
    "Only signals of rules in this mode; those of `shadow` rules are sent to nobody.",
    read_choice(ALERT, SHADOW),
    {"type": "string", "enum": [ALERT, SHADOW]},
)
SERVICE = Param("service", "Only signals of traces whose `service` this is.", read_text)
HEX_TRACE = {"type": "string", "pattern": "^[0-9a-fA-F]{32}$"}
TRACE_ID = Param("trace_id", "The id of the trace, 32 hex digits.", read_hex(32), HEX_TRACE)
SIGNAL_ID = Param("id", "The id of the signal, 32 hex digits.", read_hex(32), HEX_TRACE)


def _api(call: Call) -> Api:
    return call.tools.sources.settings.api


def _page_and_filters(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """The limit and the cursor; and the filters, whose parameters have the names that they have in
    the store."""
    filters = dict(call.params)
    return {name: filters.pop(name) for name in ("limit", "cursor")}, filters


@endpoints.add(
    "GET",
    "/api/v1/signals",
    "Signals, newest first",
    params=(
        RULE,
        SEVERITY,
        Param("trace_id", "Only signals of this trace, 32 hex digits.", read_hex(32), HEX_TRACE),
        Param(
            "status",
            "Only active or only retracted signals.",
            read_choice(*STATUSES),
            {"type": "string", "enum": list(STATUSES)},
        ),
        MODE,
        SERVICE,
        SINCE,
        UNTIL,
        LIMIT,
        CURSOR,
    ),
    answers={200: '`{"signals": […], "next": cursor or null}`'},
)
async def list_signals(call: Call) -> Any:
    """For the next page, pass `next` as `cursor` with the same filters; it is null on the last.
    `muted` says whether the rule was muted when the signal was raised; `acknowledged` is null, or
    has `at`, `by` and `note`. `mode` is that of the rule at the time. `service` is that of the
    trace's root span or, if that had not arrived, of its first span; null if it is not known.
    `missing_parents` says how many parents that spans name had not come when the trace was closed
    (then `reason` says so, too); it is 0 if all were there, for signals raised before the end, and
    if there was no time to look. With `api.public_url`, `url` is the address of the signal's
    page."""
    page, filters = _page_and_filters(call)
    signals = partial(call.tools.store.signals, call.tenant, SignalFilter(**filters), **page)
    found, following = await call.blocking(signals)
    call.tools.metadata.listed(call.tenant, found)
    shown = await call.blocking(signals_json, call.tools.triage, call.tenant, found, _api(call))
    return {"signals": shown, "next": following}


@endpoints.add(
    "GET",
    "/api/v1/signals/stream",
    "Signals as they are stored, as server-sent events",
    params=(RULE, SEVERITY, SERVICE),
    answers={200: "Events named `signal`, whose data is a signal and whose id is its id"},
    media_type=EVENTS_TYPE,
)
async def stream_signals(call: Call) -> Answer:
    """Starts now; read the list for earlier signals. After 15 s of silence a comment is sent. A
    client that is too slow misses signals."""
    wanted = call.params

    async def events() -> AsyncIterator[bytes]:
        subscription = call.tools.subscriptions.open(call.tenant)
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
                elif (
                    wanted["rule"] in (None, signal.rule_id)
                    and wanted["severity"] in (None, signal.severity)
                    and wanted["service"] in (None, signal.service)
                ):
                    yield event("signal", linked(signal_json(signal), _api(call)), signal.id)
        finally:
            subscription.close()

    return call.stream(events)


@endpoints.add(
    "GET",
    "/api/v1/signals/summary",
    "Counts of signals by rule, severity and time",
    params=(
        Param("since", "At or after this time; by default an hour before `until`.", read_time),
        Param("until", "Before this time; by default now.", read_time),
        Param(
            "bucket",
            "Width of a bucket, such as `5m`; by default a 60th of the time.",
            read_duration,
        ),
    ),
    answers={200: "`total`, `retracted`, `by_rule`, `by_severity` and `buckets`"},
)
async def summarise_signals(call: Call) -> Any:
    """Counts raised signals, and how many of them were retracted later. Buckets start at multiples
    of their width; empty ones are omitted. At most 1000 buckets."""
    given = call.params
    until = given["until"] if given["until"] is not None else read_time("now")
    since = given["since"] if given["since"] is not None else max(until - 3600 * SECOND, 0)
    if since >= until:
        raise ApiError(400, "since must be earlier than until", "swap them, or choose other times")
    bucket = given["bucket"] or max((until - since) // 60, SECOND)
    if bucket < SECOND or (until - since) / bucket > MAX_BUCKETS:
        raise ApiError(
            400,
            f"bucket is below a second or makes more than {MAX_BUCKETS} buckets",
            "choose a wider bucket or a shorter time",
        )
    rows = await call.blocking(call.tools.store.summary, call.tenant, since, until, bucket)
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
    found = await call.blocking(call.tools.signal, call.tenant, call.params["id"])
    if found is None:
        raise _no_signal(call.params["id"])
    (shown,) = await call.blocking(
        signals_json, call.tools.triage, call.tenant, [found], _api(call)
    )
    return shown


@endpoints.add(
    "POST",
    "/api/v1/signals/{id}/acknowledge",
    "Acknowledge a signal",
    path_params=(SIGNAL_ID,),
    body={"type": "object", "properties": {"note": {"type": "string"}}},
    answers={200: '`{"at", "by", "note"}`', 404: "There is no such signal"},
)
async def acknowledge_signal(call: Call) -> Any:
    """Says that someone takes care of it. `by` is the name in `X-Operator`, or the tenant. A new
    acknowledgement replaces an earlier one. The audit log records it; the ledger is unchanged."""
    signal_id = call.params["id"]
    note = call.json({}, {"note": str}).get("note", "").strip()
    if len(note) > MAX_NOTE:
        raise ApiError(400, f"note has more than {MAX_NOTE} characters", "shorten it")
    if await call.blocking(call.tools.signal, call.tenant, signal_id) is None:
        raise _no_signal(signal_id)
    who = call.person()
    target = {"tenant": call.tenant, "signal": signal_id, "note": note}
    await call.tools.audit.note(who, "signal.acknowledge", target)
    acknowledge = call.tools.triage_writer.acknowledge
    return acknowledgement_json(
        await call.blocking(acknowledge, call.tenant, signal_id, note, who.name)
    )


def _no_signal(signal_id: str) -> ApiError:
    return ApiError(404, f"there is no signal {signal_id}", "list the signals: /api/v1/signals")


@endpoints.add(
    "GET",
    "/api/v1/traces",
    "Recent traces, newest first",
    params=(
        Param("service", "Only traces with a span of this service.", read_text),
        Param("name", "Only traces whose root span has this name.", read_text),
        Param("min_duration", "Only traces at least this long, such as `250ms`.", read_duration),
        SINCE,
        Param(
            "has_signal",
            "Only traces with (or without) active signals.",
            read_bool,
            {"type": "boolean"},
        ),
        LIMIT,
        CURSOR,
    ),
    answers={200: '`{"traces": […], "next": cursor or null, "searched_to": time or null}`'},
)
async def list_traces(call: Call) -> Any:
    """Traces are listed once they are closed. A search that takes long, because there are millions
    of traces, stops before the page is full: then `searched_to` is the start time down to which it
    searched, and `next` continues from there. Otherwise `searched_to` is null."""
    page, filters = _page_and_filters(call)
    traces = partial(call.tools.store.traces, call.tenant, TraceFilter(**filters), **page)
    found = await call.blocking(traces)
    return {
        "traces": [trace_row_json(row) for row in found.rows],
        "next": found.next,
        "searched_to": None if found.searched_to is None else write_time(found.searched_to),
    }


@endpoints.add(
    "GET",
    "/api/v1/traces/{trace_id}",
    "A trace as OTLP JSON, with its signals and the verdict of each rule",
    path_params=(TRACE_ID,),
    answers={
        200: "`resourceSpans` (OTLP JSON), `state`, `signals`, `verdicts`, `missing`, `omitted`, "
        "`omittedSpans`, `missing_parents`",
        404: "There is no such trace",
    },
)
async def get_trace(call: Call) -> Any:
    """`state` is `open` or `closed`. The spans are read from the span log: `missing` is the number
    of requests with spans of the trace that are damaged or past retention, `omitted` the number
    left out because the trace is too long, and `omittedSpans` the number of spans.
    `missing_parents` is the number of parents that spans name and that never came (null if not all
    spans could be read). `verdicts` are
    those of the current rules, by id: `verdict` is `breach` (with `clause`, and the id of the
    `signal` if there is one), `kept`, `open` (the trace is open) or `unknown` (spans are
    missing; or `undecided` says why, such as that 3 s of processor time were not enough).
    `skipped` says why a rule with `incomplete: skip` did not judge the trace."""
    trace_id = call.params["trace_id"]

    def read() -> bytes | None:
        trace = call.tools.reader.trace(call.tenant, trace_id)
        return None if trace is None else orjson.dumps(trace)  # here, because it may be large

    shown = await call.blocking(read)
    if shown is None:
        node = call.tools.sources.node
        raise ApiError(
            404,
            f"there is no trace {trace_id}",
            "a trace appears shortly after its first span is accepted"
            if node is None
            else f"a trace appears once it is closed and applied at {node.name}, and before that "
            "while its evaluator answers; see /api/cluster",
        )
    return Answer(shown)
