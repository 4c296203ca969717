"""The API over the real stores: rule files, DuckDB, the span log, and the engine."""

import gzip
import json
import time

import pytest

from service.http.api import create_api
from service.http.stores import StoreQueries
from service.rules.files import RuleStore
from service.rules.registry import RuleRegistry
from service.signals import Kind, Signal, rule_version, signal_id
from service.storage.duck import DuckStore
from service.storage.frames import Frame
from service.storage.spanlog import SpanLog

from .scripted import ScriptedBackend

pytestmark = pytest.mark.kernel

SECOND = 10**9
NOW = time.time_ns() // SECOND * SECOND
TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "1" * 32
RULE = {"condition": "never { payment.bypass }", "severity": "critical"}


def span(name, number, trace=TRACE):
    return {
        "traceId": trace,
        "spanId": f"{number:016x}",
        "name": name,
        "startTimeUnixNano": str(NOW + number),
        "endTimeUnixNano": str(NOW + number + 5),
    }


def otlp(*spans):
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


@pytest.fixture
def stores(tmp_path):
    class Stores:
        pass

    (tmp_path / "rules").mkdir()
    s = Stores()
    s.rules = RuleStore(tmp_path / "rules")
    s.rules.load()
    s.directory = tmp_path / "rules"
    s.registry = RuleRegistry(s.rules, 10)
    with DuckStore(tmp_path / "duck") as s.duck, SpanLog(tmp_path / "log") as s.log:
        backend = ScriptedBackend()
        backend.queries = s.queries = StoreQueries(
            s.duck, s.log, s.rules, s.registry.compiled, 1 << 20
        )
        s.client = create_api(backend).test_client()
        yield s


async def ask(stores, method, path, status=200, body=None, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    options = {} if body is None else {"json": body}
    answer = await stores.client.open(path, method=method, headers=names, **options)
    text = await answer.get_data()
    assert answer.status_code == status, text
    return json.loads(text) if text else None


def store_trace(stores, frames, trace=TRACE):
    positions = stores.log.append("default", frames)
    columns = {
        "trace_id": [bytes.fromhex(trace)],
        "start_ns": [NOW],
        "end_ns": [NOW + 7],
        "first_seen_ns": [NOW],
        "last_seen_ns": [NOW],
        "spans": [2],
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


async def test_a_trace_with_its_signals_and_verdicts(stores):
    await ask(stores, "PUT", "/api/v1/rules/bypass", 201, RULE)
    await ask(stores, "PUT", "/api/v1/rules/kept", 201, {"condition": "always { checkout }"})
    store_trace(
        stores,
        [
            frame(span("checkout", 1), span("elsewhere", 9, OTHER)),
            frame(span("payment.bypass", 2), encoding="gzip"),
            Frame("json", "gzip", NOW, b"damaged", 1),
        ],
    )
    stores.duck.write_signals("default", [make_signal()])
    trace = await ask(stores, "GET", f"/api/v1/traces/{TRACE}")
    spans = [
        s["name"]
        for resource in trace["resourceSpans"]
        for scope in resource["scopeSpans"]
        for s in scope["spans"]
    ]
    assert spans == ["checkout", "payment.bypass"]
    assert trace["missingFrames"] == 1
    assert [s["rule_id"] for s in trace["signals"]] == ["bypass"]
    assert trace["verdicts"]["bypass"] == {
        "breach": True,
        "clause": "never",
        "counts": {"payment.bypass": 1},
        "evidence": {"payment.bypass": [f"{2:016x}"]},
    }
    kept = trace["verdicts"]["kept"]
    assert (kept["breach"], kept["clause"], kept["counts"]) == (False, None, {"checkout": 1})
    assert (trace["duration_ns"], trace["root_name"]) == (7, "checkout")


async def test_a_trace_whose_frames_are_gone(stores):
    store_trace(stores, [frame(span("checkout", 1, OTHER))])
    trace = await ask(stores, "GET", f"/api/v1/traces/{TRACE}")
    assert (trace["resourceSpans"], trace["verdicts"]) == ([], {})


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
    assert "not one of this list" in error["error"]["message"]


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
