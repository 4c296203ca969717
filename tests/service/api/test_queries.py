"""The API's queries over the real stores: rule files, DuckDB, the span log, and the engine."""

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from betrace.channels import ThreadRunner, open_channel
from betrace.service.api import trace_view as tracequery
from betrace.service.api.app import create_api
from betrace.service.api.queries import StoreQueries
from betrace.service.api.trace_cache import TraceMetadataCache
from betrace.service.otlp.json import to_protobuf
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.progress import InFlight, LogProgress
from betrace.service.pipeline.recovery.history import TraceHistory
from betrace.service.pipeline.stages.correlate import CorrelateStage, TraceLimits
from betrace.service.pipeline.stages.evaluate import decide_due
from betrace.service.pipeline.trace_rows import frame_columns, trace_table
from betrace.service.pipeline.warmup import warm_up
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.signals import Kind, Signal, rule_version, signal_id
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.window import Windows
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.kernel

SECOND = 10**9
NOW = time.time_ns() // SECOND * SECOND
TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "1" * 32
RULE = {"condition": "never { payment.bypass }", "severity": "critical"}


def span(name, number, trace=TRACE, **attributes):
    return {
        "traceId": trace,
        "spanId": f"{number:016x}",
        "name": name,
        "startTimeUnixNano": str(NOW + number),
        "endTimeUnixNano": str(NOW + number + 5),
        "attributes": [
            {"key": key.replace("_", "."), "value": {"boolValue": value}}
            for key, value in attributes.items()
        ],
    }


END = {"trace_complete": True}


def otlp(*spans):
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


@pytest.fixture(scope="module")
def warm():
    """Kernels compile for longer than a query may take."""
    warm_up()


@pytest.fixture
def stores(tmp_path, warm):
    (tmp_path / "rules").mkdir()
    s = SimpleNamespace(directory=tmp_path / "rules", rules=RuleStore(tmp_path / "rules"))
    s.rules.load()
    s.registry = RuleRegistry(s.rules, 10)
    s.due, s.received = open_channel("due", 1000, lambda due: len(due) or 1)
    s.progress = LogProgress()
    threads = ThreadRunner("correlate", 1)
    s.correlate = CorrelateStage(
        s.registry.compiled,
        threads,
        s.due,
        s.progress,
        InFlight(),
        TraceLimits(SECOND, SECOND, SECOND, SECOND, 100, 1000),
        ClosedTraces(1 << 16),
        lambda tenant, ids: s.history.load(tenant, ids),
        Windows(),
        time.time_ns,
    )
    with DuckStore(tmp_path / "duck") as s.duck, SpanLog(tmp_path / "log") as s.log:
        s.history = TraceHistory(s.duck, s.log, 1 << 20)
        backend = ScriptedBackend()
        metadata = TraceMetadataCache(s.duck, maxsize=100, ttl_seconds=300, max_bytes=1 << 20)
        backend.queries = s.queries = StoreQueries(
            s.duck, metadata, s.log, s.registry, s.correlate, 1 << 20
        )
        s.client = create_api(backend).test_client()
        yield s
    threads.close()


async def accept(stores, *spans):
    """What ingestion and correlation do with a request."""
    sent = frame(*spans)
    positions = stores.progress.append("default", lambda: stores.log.append("default", [sent]))
    batch = scan_bodies("default", [to_protobuf(sent.payload)])
    batch.positions = np.array(positions)
    batch.received_ns = sent.received_ns
    await stores.correlate.handle([batch])


def project(stores):
    """What evaluation and storage do with all that is due."""
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
    answer = await stores.client.open(path, method=method, headers=names, **options)
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


def make_signal(number=0, rule="bypass", kind=Kind.RAISED):
    version = rule_version(RULE["condition"])
    return Signal(
        id=signal_id("default", rule, version, TRACE, kind),
        tenant="default",
        rule_id=rule,
        rule_version=version,
        severity="critical",
        kind=kind,
        clause="never",
        trace_id=TRACE,
        detected_at=NOW + number,
        early=False,
        counts={"payment.bypass": 1},
        evidence={"payment.bypass": [f"{2:016x}"]},
        message="broken",
    )


async def add_rules(stores, **conditions):
    for rule_id, condition in conditions.items():
        await ask(stores, "PUT", f"/api/v1/rules/{rule_id}", 201, {"condition": condition})


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


@pytest.mark.parametrize("damage", [b"damaged", gzip.compress(b"no JSON"), gzip.compress(b"5")])
async def test_what_is_damaged_makes_only_certain_verdicts(stores, damage):
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


async def test_frames_that_were_released_are_missing_and_the_signal_still_tells(stores):
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


async def test_spans_that_are_nowhere_make_nothing_certain(stores):
    await add_rules(stores, absent="always { ship }")
    store_trace(stores, [frame(span("checkout", 1))], spans=2)
    trace = await show(stores)
    assert (trace["missing"], said(trace)) == (0, {"absent": "unknown"})


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
    assert trace["verdicts"]["seen"]["signal"] is None  # it is on its way
    project(stores)
    trace = await show(stores)
    assert trace["verdicts"]["seen"]["signal"] == trace["signals"][0]["id"]
    await accept(stores, span("ship", 3, **END))
    for _ in range(2):  # closed and not yet stored, then stored
        trace = await show(stores)
        assert (trace["state"], trace["spans"]) == ("closed", 3)
        assert names(trace) == ["checkout", "pay", "ship"]
        assert said(trace) == {"seen": "breach", "absent": "kept"}
        project(stores)


async def test_a_trace_that_is_closed_and_opened_again(stores):
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


async def test_a_long_trace_with_positions_in_all_places(stores):
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


async def test_a_trace_is_decided_by_the_rules_of_now(stores):
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


async def test_a_very_long_trace_is_shown_in_part_and_judged_as_a_whole(stores, monkeypatch):
    monkeypatch.setattr(tracequery, "MAX_SPANS", 3)
    await add_rules(stores, last="never { s7 }", none="never { x }")
    frames = [frame(span(f"s{n}", n + 1), span(f"t{n}", n + 100)) for n in range(8)]
    store_trace(stores, [*frames, frame(span("elsewhere", 1, OTHER))])
    trace = await show(stores)
    assert names(trace) == ["s0", "t0", "s1", "t1"]
    assert (trace["omitted"], trace["missing"]) == (6, 0)
    assert said(trace) == {"last": "breach", "none": "kept"}


@pytest.mark.parametrize(("limit", "value"), [("MAX_FRAMES", 2), ("MAX_BYTES", 100)])
async def test_too_much_to_read(stores, monkeypatch, limit, value):
    monkeypatch.setattr(tracequery, limit, value)
    await add_rules(stores, last="never { s7 }", first="never { s0 }")
    store_trace(stores, [frame(span(f"s{n}", n + 1), span("t", n + 100)) for n in range(8)])
    trace = await show(stores)
    assert trace["omitted"] == 8 - len(names(trace)) // 2 > 0
    assert said(trace) == {"last": "unknown", "first": "breach"}


async def test_many_threads_ask_while_spans_come(stores):
    await add_rules(stores, some="never { s.*7 }", few="count(s.*) < 30")
    stop = threading.Event()

    def ask_again():
        seen = 0
        while not stop.is_set():
            trace = stores.queries.trace("default", TRACE)
            if trace is not None:
                assert trace["spans"] >= seen
                seen = trace["spans"]
                # Positions may be between memory and store: spans can be missing, never a verdict.
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
            await trio.sleep(0.1)
        finally:
            stop.set()
        assert [asker.result() for asker in askers] == [40] * 3
    assert said(await show(stores)) == {"some": "breach", "few": "kept"}


async def test_nothing_of_another_tenant_is_shown(stores):
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


async def test_a_store_that_cannot_answer_is_a_503(stores):
    stores.duck.write_signals("default", [make_signal()])
    stores.duck.close()
    error = await ask(stores, "GET", "/api/v1/signals", 503)
    assert "store cannot answer" in error["error"]["message"]


async def test_rules_are_files_and_change_under_their_etag(stores):
    created = await ask(stores, "PUT", "/api/v1/rules/bypass", 201, RULE)
    assert (created["name"], created["enabled"]) == ("bypass", True)
    assert (stores.directory / "default" / "bypass.yaml").exists()
    assert await ask(stores, "GET", "/api/v1/rules/bypass") == created
    (listed,) = (await ask(stores, "GET", "/api/v1/rules"))["rules"]
    assert listed == {**created, "active_signals": 0}
    await ask(stores, "PUT", "/api/v1/rules/bypass", 428, RULE)
    low = {**RULE, "severity": "low"}
    changed = await ask(stores, "PUT", "/api/v1/rules/bypass", 200, low, If_Match=created["etag"])
    assert changed["etag"] != created["etag"]
    assert changed["version"] == created["version"]  # the condition is the same
    await ask(stores, "PUT", "/api/v1/rules/bypass", 412, RULE, If_Match=created["etag"])
    assert [r.severity for r in stores.rules.versions("default", "bypass")] == ["critical"]
    await ask(stores, "PUT", "/api/v1/rules/none", 404, RULE, If_Match="*")
    await ask(stores, "DELETE", "/api/v1/rules/none", 404, If_Match="*")
    await ask(stores, "DELETE", "/api/v1/rules/bypass", 412, If_Match=created["etag"])
    await ask(stores, "DELETE", "/api/v1/rules/bypass", 204, If_Match=changed["etag"])
    assert (await ask(stores, "GET", "/api/v1/rules"))["rules"] == []


async def test_a_change_of_rules_takes_effect_at_once(stores):
    assert stores.registry.compiled("default").rules == ()
    created = await ask(stores, "PUT", "/api/v1/rules/bypass", 201, RULE)
    (compiled,) = stores.registry.compiled("default").rules
    assert compiled.version == created["version"]
    await ask(stores, "DELETE", "/api/v1/rules/bypass", 204, If_Match="*")
    assert stores.registry.compiled("default").rules == ()


async def test_rules_with_how_many_signals_stand(stores):
    await add_rules(stores, a="never { x }", b="never { y }")
    path = "/api/v1/rules"
    signals = [make_signal(0, "a"), make_signal(1, "b"), make_signal(2, "b", Kind.RETRACTED)]
    stores.duck.write_signals("default", [*signals, make_signal(3, "gone")])
    rules = (await ask(stores, "GET", path))["rules"]
    assert [(r["id"], r["active_signals"]) for r in rules] == [("a", 1), ("b", 0)]
    stores.duck.close()
    rules = (await ask(stores, "GET", path))["rules"]
    assert [(r["id"], r["active_signals"]) for r in rules] == [("a", None), ("b", None)]


async def test_rules_written_by_hand_are_not_overwritten(stores):
    text = "rules:\n  - {id: a, condition: x}\n  - {id: b, condition: y}\n"
    (stores.directory / "shop.yaml").write_text(text)
    stores.rules.poll()
    error = await ask(stores, "PUT", "/api/v1/rules/a", 409, RULE, If_Match="*")
    assert "shop.yaml" in error["error"]["message"]
    await ask(stores, "DELETE", "/api/v1/rules/a", 409, If_Match="*")


async def test_a_rule_that_is_wrong_is_not_saved(stores):
    body = {"condition": "never {\n  payment > 3 }", "labels": {"a": [1]}}
    error = (await ask(stores, "PUT", "/api/v1/rules/a", 400, body))["error"]
    assert sorted(str(f["line"]) for f in error["errors"]) == ["2", "None"]
    assert not (stores.directory / "default").exists()


async def test_a_full_disk_is_a_503(stores, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.rules, "put", full)
    error = (await ask(stores, "PUT", "/api/v1/rules/a", 503, RULE))["error"]
    assert "No space left" in error["message"]


@pytest.mark.parametrize(
    ("condition", "breach", "clause", "counts"),
    [
        ("never { a }", True, "never", {"a": 2}),
        ("always { b }", True, "always", {"b": 0}),
        ("when { a } always { a }", False, None, {"a": 2}),
        ("count(a) > 1", True, "never", {"a": 2}),
    ],
)
async def test_trying_a_rule(stores, condition, breach, clause, counts):
    body = {"condition": condition, "trace": otlp(span("a", 1), span("a", 2))}
    answer = await ask(stores, "POST", "/api/v1/rules/test", 200, body)
    assert (answer["breach"], answer["clause"], answer["counts"]) == (breach, clause, counts)
    assert set(answer) == {"breach", "clause", "counts", "evidence"}
    if "a" in counts:
        assert answer["evidence"]["a"] == [f"{1:016x}", f"{2:016x}"]


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (otlp(), "no span"),
        (otlp(span("a", 1), span("a", 2, OTHER)), "several traces"),
        (otlp({**span("a", 1), "traceId": "xyz"}), "traceId"),
        (otlp({**span("a", 1), "traceId": "0" * 32}), "no span"),
        ({"resourceSpans": 5}, "resourceSpans"),
        ({}, "no span"),
    ],
)
async def test_a_trace_that_cannot_be_tried(stores, trace, words):
    body = {"condition": "a", "trace": trace}
    error = (await ask(stores, "POST", "/api/v1/rules/test", 400, body))["error"]
    assert words in error["message"]
    assert "OTLP JSON" in error["hint"]


async def test_trying_a_rule_with_an_error(stores):
    body = {"condition": "never { a", "trace": otlp(span("a", 1))}
    error = (await ask(stores, "POST", "/api/v1/rules/test", 400, body))["error"]
    assert error["errors"][0]["line"] == 1
