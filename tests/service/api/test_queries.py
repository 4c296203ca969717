"""Queries on real stores: rule files, DuckDB, the span log, and the traces in memory."""

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from betrace.channels import ThreadRunner, open_channel
from betrace.service.api import trace_view
from betrace.service.api.app import create_api
from betrace.service.api.endpoint import Tools
from betrace.service.api.rule_writer import RuleWriter
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.api.trace_view import TraceReader
from betrace.service.config.settings import Settings
from betrace.service.otlp.json import to_protobuf
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.history import TraceHistory
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.stages import correlate
from betrace.service.pipeline.stages.correlate import CorrelateStage
from betrace.service.pipeline.trace_rows import frame_columns, trace_table
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.triage import TriageStore
from betrace.service.storage.undecided import UndecidedStore
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.limits import LateSpans, TraceLimits
from betrace.service.traces.verdicts import decide_due
from tests.support import inprocess
from tests.support.api_records import NOW, OTHER, RULE, SECOND, TRACE, make_signal, otlp, span
from tests.support.on_cluster import remote

END = {"trace_complete": True}
TIMES = {"now": NOW, "later": NOW + 1, "end": NOW + 2}  # not in the tests' ids


@pytest.fixture
async def log(tmp_path):
    """The span log; on a cluster its streams."""
    if inprocess.place is None:
        with SpanLog(tmp_path / "log") as log:
            yield log
    else:
        async with inprocess.place.span_log(tmp_path / "log") as log:
            yield log


@pytest.fixture
async def stores(tmp_path, warm, monkeypatch, log):
    monkeypatch.setattr(correlate, "FIRST_SLICE", 3600.0)  # nothing folds a backlog here
    monkeypatch.setattr(correlate, "ALL_SLICES", 3600.0)
    (tmp_path / "rules").mkdir()
    s = SimpleNamespace(directory=tmp_path / "rules", rules=RuleStore(tmp_path / "rules"))
    s.rules.load()
    s.registry = RuleRegistry(s.rules, 10)
    s.due, s.received = open_channel("due", 1000, lambda due: len(due) or 1)
    s.progress = LogProgress()
    threads = ThreadRunner("correlate", 1)
    traces = OpenTraces(
        s.registry.compiled,
        TraceLimits(SECOND, SECOND, SECOND, SECOND, 100, 1000),
        LateSpans(ClosedTraces(1 << 16), lambda tenant, ids: s.history.load(tenant, ids)),
        s.progress,
        InFlight(),
        time.time_ns,
    )
    s.correlate = CorrelateStage(traces, threads, s.due)
    s.triage = TriageStore(tmp_path / "triage.sqlite")
    s.undecided = UndecidedStore(tmp_path / "undecided.sqlite")
    with DuckStore(tmp_path / "duck") as s.duck:
        s.log = log
        s.history = TraceHistory(s.duck, s.log, 1 << 20)
        metadata = TraceMetadataCache(s.duck, maxsize=100, ttl_seconds=300, max_bytes=1 << 20)
        config = Settings(ingest={"max_body_bytes": 1 << 20})
        seen = traces if inprocess.place is None else remote(traces)
        s.reader = TraceReader(s.duck, metadata, s.log, s.rules.rules, seen, s.triage, config)
        api_threads = ThreadRunner("api", 2)
        tools = Tools(
            SimpleNamespace(settings=config, rules=s.rules, node=None),
            s.duck,
            metadata,
            s.reader,
            RuleWriter(s.registry, ()),
            *[None] * 3,
            s.triage,
            s.undecided,
            *[None] * 2,
            api_threads,
        )
        s.client = create_api(tools, None, ()).test_client()
        yield s
    s.triage.close()
    s.undecided.close()
    threads.close()
    api_threads.close()


async def accept(stores, *spans):
    """Do what ingestion and correlation do with a request."""
    sent = frame(*spans)
    positions = stores.progress.append("default", lambda: stores.log.append("default", [sent]))
    batch = scan_bodies("default", [to_protobuf(sent.payload)])
    batch.positions = np.array(positions)
    batch.received_ns = sent.received_ns
    await stores.correlate.handle([batch])


def project(stores):
    """Do what evaluation and storage do with all due traces."""
    while True:
        try:
            due = stores.received.receive_nowait()
        except trio.WouldBlock:
            return
        decided = decide_due(due, NOW)
        stores.duck.write(
            "default",
            signals=decided.signals,
            traces=None if decided.closed is None else trace_table(decided.closed),
            frames=None if decided.spilled is None else frame_columns(decided.spilled),
        )


def names(trace):
    return [
        span["name"]
        for resource in trace["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def said(trace):
    return {rule: verdict["verdict"] for rule, verdict in trace["verdicts"].items()}


async def show(stores, status=200):
    return await ask(stores, "GET", f"/api/v1/traces/{TRACE}", status)


async def ask(stores, method, path, status=200, body=None, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    options = {} if body is None else {"json": body}
    answer = stores.answer = await stores.client.open(path, method=method, headers=names, **options)
    text = await answer.get_data()
    assert answer.status_code == status, text
    return json.loads(text) if text else None


def store_trace(stores, frames, trace=TRACE, spans=1):
    positions = stores.log.append("default", frames)
    columns = {
        "trace_id": [bytes.fromhex(trace)],
        "start_ns": [NOW],
        "end_ns": [NOW + 7],
        "first_seen_ns": [NOW],
        "last_seen_ns": [NOW],
        "spans": [spans],
        "errors": [0],
        "root_name": ["checkout"],
        "root_service": ["shop"],
        "services": [["shop"]],
        "partial": [False],
        "rules_version": ["v"],
        "positions": [positions],
    }
    stores.duck.write_traces("default", columns)
    return positions


def frame(*spans, encoding=""):
    body = json.dumps(otlp(*spans)).encode()
    payload = gzip.compress(body) if encoding == "gzip" else body
    return Frame("json", encoding, NOW, payload, len(spans))


async def add_rules(stores, **conditions):
    for rule_id, condition in conditions.items():
        await ask(stores, "PUT", f"/api/v1/rules/{rule_id}", 201, {"condition": condition})


@pytest.mark.also_on_cluster
async def test_a_trace_with_its_signals_and_verdicts(stores):
    await ask(stores, "PUT", "/api/v1/rules/bypass", 201, RULE)
    await add_rules(stores, kept="always { checkout }", off="never { checkout }")
    off = {"condition": "never { checkout }", "enabled": False}
    await ask(stores, "PUT", "/api/v1/rules/off", 200, off, If_Match="*")
    frames = [
        frame(span("checkout", 1), span("elsewhere", 9, OTHER)),
        frame(span("payment.bypass", 2), encoding="gzip"),
    ]
    store_trace(stores, frames)
    stores.duck.write_signals("default", [make_signal()])
    trace = await show(stores)
    assert names(trace) == ["checkout", "payment.bypass"]
    assert (trace["state"], trace["missing"], trace["omitted"]) == ("closed", 0, 0)
    assert [s["rule_id"] for s in trace["signals"]] == ["bypass"]
    assert trace["verdicts"] == {
        "bypass": {
            "verdict": "breach",
            "clause": "never",
            "signal": make_signal().id,
            "counts": {"payment.bypass": 1},
            "evidence": {"payment.bypass": [f"{2:016x}"]},
        },
        "kept": {
            "verdict": "kept",
            "clause": None,
            "signal": None,
            "counts": {"checkout": 1},
            "evidence": {"checkout": [f"{1:016x}"]},
        },
    }
    assert (trace["duration_ns"], trace["root_name"]) == (7, "checkout")


@pytest.mark.parametrize(
    "damage",
    [b"damaged", gzip.compress(b"no JSON"), gzip.compress(b"5")],
    ids=["damaged", "not JSON", "a number"],
)
async def test_with_damaged_frames_only_breaches_are_certain(stores, damage):
    await add_rules(stores, seen="never { checkout }", absent="always { ship }", may="never { x }")
    frames = [
        frame(span("checkout", 1)),
        Frame("json", "gzip", NOW, damage, 1),
        Frame("protobuf", "", NOW, b"\xff", 1),
        frame(span("pay", 2)),
    ]
    store_trace(stores, frames)
    trace = await show(stores)
    assert names(trace) == ["checkout", "pay"]
    assert trace["missing"] == 2
    assert said(trace) == {"seen": "breach", "absent": "unknown", "may": "unknown"}
    assert trace["verdicts"]["seen"]["signal"] is None


@pytest.mark.also_on_cluster
async def test_released_frames_are_missing_but_the_signal_has_the_verdict(stores):
    await ask(stores, "PUT", "/api/v1/rules/bypass", 201, RULE)
    await add_rules(stores, other="never { checkout }")
    positions = store_trace(stores, [frame(span("checkout", 1)), frame(span("payment.bypass", 2))])
    stores.log.delete_tenant("default")
    stores.duck.write_signals("default", [make_signal()])
    trace = await show(stores)
    assert (names(trace), trace["missing"]) == ([], len(positions))
    assert said(trace) == {"bypass": "breach", "other": "unknown"}
    told = trace["verdicts"]["bypass"]
    assert (told["clause"], told["counts"]) == ("never", {"payment.bypass": 1})


async def test_missing_spans_make_verdicts_unknown(stores):
    await add_rules(stores, absent="always { ship }")
    store_trace(stores, [frame(span("checkout", 1))], spans=2)
    trace = await show(stores)
    assert (trace["missing"], said(trace)) == (0, {"absent": "unknown"})


@pytest.mark.also_on_cluster
async def test_an_open_trace(stores):
    await add_rules(stores, seen="never { pay }", absent="always { ship }")
    await show(stores, 404)
    await accept(stores, span("checkout", 1), span("elsewhere", 9, OTHER))
    trace = await show(stores)
    assert (trace["state"], trace["spans"], names(trace)) == ("open", 1, ["checkout"])
    assert (trace["root_name"], trace["root_service"], trace["services"]) == ("checkout", None, [])
    assert said(trace) == {"seen": "open", "absent": "open"}
    await accept(stores, span("pay", 2))
    trace = await show(stores)
    assert names(trace) == ["checkout", "pay"]
    assert said(trace) == {"seen": "breach", "absent": "open"}
    assert trace["verdicts"]["seen"]["signal"] is None  # not recorded yet
    project(stores)
    trace = await show(stores)
    assert trace["verdicts"]["seen"]["signal"] == trace["signals"][0]["id"]
    await accept(stores, span("ship", 3, **END))
    for _ in range(2):  # first closed but not stored, then stored
        trace = await show(stores)
        assert (trace["state"], trace["spans"]) == ("closed", 3)
        assert names(trace) == ["checkout", "pay", "ship"]
        assert said(trace) == {"seen": "breach", "absent": "kept"}
        project(stores)


@pytest.mark.also_on_cluster
async def test_a_reopened_trace(stores):
    await add_rules(stores, absent="always { ship }")
    await accept(stores, span("checkout", 1, **END))
    project(stores)
    trace = await show(stores)
    assert (trace["state"], said(trace)) == ("closed", {"absent": "breach"})
    (signal,) = trace["signals"]
    assert trace["verdicts"]["absent"]["signal"] == signal["id"]
    await accept(stores, span("ship", 2))
    trace = await show(stores)
    assert (trace["state"], names(trace)) == ("open", ["checkout", "ship"])
    assert said(trace) == {"absent": "breach"}  # until it is retracted
    await accept(stores, span("done", 3, **END))
    project(stores)
    trace = await show(stores)
    assert (trace["state"], names(trace)) == ("closed", ["checkout", "ship", "done"])
    assert said(trace) == {"absent": "kept"}
    assert sorted(s["status"] for s in trace["signals"]) == ["retracted", "retracted"]


async def test_a_long_trace_with_spilled_positions(stores):
    for number in range(20):
        await accept(stores, span(f"s{number}", number + 1))
        if number == 17:
            project(stores)
    wanted = [f"s{number}" for number in range(20)]
    trace = await show(stores)
    assert (trace["state"], trace["spans"], names(trace)) == ("open", 20, wanted)
    await accept(stores, span("end", 99, **END))
    project(stores)
    trace = await show(stores)
    assert (trace["state"], names(trace)) == ("closed", [*wanted, "end"])


async def test_a_trace_is_evaluated_by_the_current_rules(stores):
    await add_rules(stores, first="never { checkout }")
    await accept(stores, span("checkout", 1, **END))
    project(stores)
    old = (await show(stores))["verdicts"]["first"]
    changed = {"condition": "never { checkout.* }"}
    await ask(stores, "PUT", "/api/v1/rules/first", 200, changed, If_Match="*")
    await add_rules(stores, second="never { check* }")
    trace = await show(stores)
    assert said(trace) == {"first": "kept", "second": "breach"}
    assert [s["id"] for s in trace["signals"]] == [old["signal"]]
    assert trace["verdicts"]["first"]["signal"] is None


async def test_a_very_long_trace_is_shown_in_part_and_evaluated_as_a_whole(stores, monkeypatch):
    monkeypatch.setattr(trace_view, "MAX_SPANS", 3)
    await add_rules(stores, last="never { s7 }", none="never { x }")
    frames = [frame(span(f"s{n}", n + 1), span(f"t{n}", n + 100)) for n in range(8)]
    store_trace(stores, [*frames, frame(span("elsewhere", 1, OTHER))])
    trace = await show(stores)
    assert names(trace) == ["s0", "t0", "s1"]  # cut within a frame
    assert (trace["omitted"], trace["omittedSpans"], trace["missing"]) == (6, 13, 0)
    assert said(trace) == {"last": "breach", "none": "kept"}


@pytest.mark.parametrize(("limit", "value"), [("MAX_FRAMES", 2), ("MAX_BYTES", 100)])
async def test_a_trace_too_long_to_read(stores, monkeypatch, limit, value):
    monkeypatch.setattr(trace_view, limit, value)
    await add_rules(stores, last="never { s7 }", first="never { s0 }")
    store_trace(stores, [frame(span(f"s{n}", n + 1), span("t", n + 100)) for n in range(8)])
    trace = await show(stores)
    assert trace["omitted"] == 8 - len(names(trace)) // 2 > 0
    assert said(trace) == {"last": "unknown", "first": "breach"}


async def test_many_threads_read_while_spans_arrive(stores):
    await add_rules(stores, some="never { s.*7 }", few="count(s.*) < 30")
    stop = threading.Event()

    def ask_again():
        seen, stopped = 0, False
        while not stopped:
            stopped = stop.is_set()  # after it, ask once more: a busy machine may be late
            trace = stores.reader.trace("default", TRACE)
            if trace is not None:
                assert trace["spans"] >= seen
                seen = trace["spans"]
                # Spans may be missing while positions move to the store, verdicts may not.
                few = "unknown" if trace["state"] == "closed" else "open"
                whole = trace["state"] == "closed" and len(names(trace)) == seen
                assert said(trace)["few"] == ("kept" if whole else few)
        return seen

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask_again) for _ in range(3)]
        try:
            for number in range(39):
                await accept(stores, span(f"s.{number}", number + 1))
                project(stores)
            await accept(stores, span("s.end", 99, **END))
            project(stores)
        finally:
            stop.set()
        assert [asker.result() for asker in askers] == [40] * 3
    assert said(await show(stores)) == {"some": "breach", "few": "kept"}


async def test_other_tenants_see_nothing(stores):
    store_trace(stores, [frame(span("checkout", 1))])
    stores.duck.write_signals("default", [make_signal()])
    await ask(stores, "PUT", "/api/v1/rules/bypass", 201, RULE)
    other = {"X_Scope_OrgID": "other"}
    assert (await ask(stores, "GET", "/api/v1/signals", **other))["signals"] == []
    assert (await ask(stores, "GET", "/api/v1/traces", **other))["traces"] == []
    assert (await ask(stores, "GET", "/api/v1/rules", **other))["rules"] == []
    await ask(stores, "GET", f"/api/v1/traces/{TRACE}", 404, **other)
    await ask(stores, "GET", f"/api/v1/signals/{make_signal().id}", 404, **other)
    await ask(stores, "GET", "/api/v1/rules/bypass", 404, **other)
    summary = await ask(stores, "GET", "/api/v1/signals/summary?since=-1d&until=now", **other)
    assert summary["total"] == 0


async def test_signals_and_traces_in_pages(stores):
    stores.duck.write_signals("default", [make_signal(n, f"rule-{n}") for n in range(3)])
    path, seen = "/api/v1/signals?limit=2", []
    while path:
        page = await ask(stores, "GET", path)
        seen += [s["rule_id"] for s in page["signals"]]
        path = page["next"] and f"/api/v1/signals?limit=2&cursor={page['next']}"
    assert seen == ["rule-2", "rule-1", "rule-0"]
    one = await ask(stores, "GET", f"/api/v1/signals/{make_signal(1, 'rule-1').id}")
    assert (one["status"], one["kind"]) == ("active", "raised")
    store_trace(stores, [frame(span("checkout", 1))])
    (trace,) = (await ask(stores, "GET", "/api/v1/traces?service=shop&has_signal=true"))["traces"]
    assert trace["trace_id"] == TRACE
    assert (await ask(stores, "GET", "/api/v1/traces?min_duration=1s"))["traces"] == []
    error = await ask(stores, "GET", "/api/v1/traces?cursor=abc", 400)
    assert "does not belong to this list" in error["error"]["message"]


async def test_the_summary(stores):
    stores.duck.write_signals("default", [make_signal(), make_signal(1, "other")])
    path = f"/api/v1/signals/summary?since={NOW - SECOND}&until={NOW + SECOND}&bucket=1s"
    summary = await ask(stores, "GET", path)
    assert summary["by_rule"] == {"bypass": 1, "other": 1}
    assert [b["total"] for b in summary["buckets"]] == [2]
    assert summary["by_severity"]["critical"] == summary["total"] == 2
    assert summary["bucket_seconds"] == 1
    by_default = await ask(stores, "GET", "/api/v1/signals/summary?until=now")
    assert by_default["bucket_seconds"] == 60


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ("", [0, 1, 2]),
        ("rule=rule-1", [1]),
        ("severity=low", []),
        ("severity=critical", [0, 1, 2]),
        ("status=retracted", []),
        (f"trace_id={TRACE.upper()}", [0, 1, 2]),
        (f"trace_id={OTHER}", []),
        ("since={later}", [1, 2]),
        ("until={later}", [0]),
        ("rule=rule-1&since={now}&until={end}&limit=1", [1]),
        ("service=bank", [2]),
        ("service=ban", []),
    ],
)
async def test_filters_of_signals(stores, filters, found):
    signals = [make_signal(n, f"rule-{n}") for n in range(3)]
    signals[2] = replace(signals[2], context={"service": "bank"})
    stores.duck.write_signals("default", signals)
    page = await ask(stores, "GET", f"/api/v1/signals?{filters.format(**TIMES)}")
    assert all(s["context"] is None for s in page["signals"])
    services = [s["service"] for s in page["signals"]]
    assert services == ["bank" if s["rule_id"] == "rule-2" else None for s in page["signals"]]
    assert sorted(s["rule_id"] for s in page["signals"]) == [f"rule-{n}" for n in found]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ("service=shop", True),
        ("service=other", False),
        ("name=checkout", True),
        ("name=x", False),
        ("min_duration=7ns", True),
        ("min_duration=8ns", False),
        ("since={now}", True),
        ("since={later}", False),
        ("has_signal=false", True),
        ("has_signal=true", False),
    ],
)
async def test_filters_of_traces(stores, filters, found):
    store_trace(stores, [frame(span("checkout", 1))])
    page = await ask(stores, "GET", f"/api/v1/traces?{filters.format(**TIMES)}")
    assert [t["trace_id"] for t in page["traces"]] == [TRACE] * found
    assert page["searched_to"] is None
    assert all(t["start"].endswith("Z") for t in page["traces"])


async def test_a_closed_store_gets_503(stores):
    stores.duck.write_signals("default", [make_signal()])
    stores.duck.close()
    error = await ask(stores, "GET", "/api/v1/signals", 503)
    assert "store cannot answer" in error["error"]["message"]
