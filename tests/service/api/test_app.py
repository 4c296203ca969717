import json
import logging
from pathlib import Path

import pytest
import trio

from betrace.service.api.app import create_api
from betrace.service.api.backend import SignalQuery, TraceQuery
from betrace.service.api.endpoints.health import metrics_app
from betrace.service.api.openapi import all_endpoints, markdown, openapi
from betrace.service.config.edge import Api
from betrace.service.storage.duck.queries import SummaryRow
from betrace.service.tenancy.access import Denied
from tests.support.scripted_backend import TRACE, ScriptedBackend, signal

ROOT = Path(__file__).parents[3]
MINUTE = 60 * 10**9


class Client:
    """Quart's test client, with JSON bodies read and errors checked for their form."""

    def __init__(self, backend=None, authenticator=None, closed=frozenset(), **settings):
        self.backend = backend or ScriptedBackend()
        self.queries = self.backend.queries
        self.app = create_api(self.backend, Api(**settings), authenticator, closed)
        self.client = self.app.test_client()

    async def ask(self, method, path, status=200, body=None, **headers):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        options = {"json": body} if isinstance(body, dict | list) else {"data": body}
        answer = await self.client.open(
            path, method=method, headers=names, **(options if body is not None else {})
        )
        self.headers = answer.headers
        text = await answer.get_data()
        assert answer.status_code == status, text
        if answer.content_type != "application/json" or not text:
            return text
        parsed = json.loads(text)
        if status >= 400 and "error" in parsed:
            assert set(parsed["error"]) >= {"code", "message", "hint"}
            return parsed["error"]
        return parsed

    async def get(self, path, status=200, **headers):
        return await self.ask("GET", path, status, **headers)


async def test_signals_in_pages():
    client = Client()
    client.queries.signals_found = [signal(n) for n in range(5)]
    seen, path = [], "/api/v1/signals?limit=2"
    while True:
        answer = await client.get(path)
        seen += [s["id"] for s in answer["signals"]]
        if answer["next"] is None:
            break
        assert len(answer["signals"]) == 2
        path = f"/api/v1/signals?limit=2&cursor={answer['next']}"
    assert seen == [f"{n:032x}" for n in range(5)]


async def test_signals_have_times_with_nanoseconds():
    client = Client()
    client.queries.signals_found = [signal(0)]
    (only,) = (await client.get("/api/v1/signals"))["signals"]
    assert only["detected_at"] == "2023-11-14T22:13:20.123456789Z"
    assert only["evidence"] == {"a": ["b7ad6b7169203331"]}


async def test_signal_filters_reach_the_store():
    client = Client()
    await client.get(
        f"/api/v1/signals?rule=payment&severity=critical&trace_id={TRACE.upper()}&status=retracted"
        "&since=2023-11-14T22:13:20Z&until=1700000001000000000&limit=7"
    )
    assert client.queries.asked == [
        (
            "default",
            SignalQuery(
                "payment",
                "critical",
                TRACE,
                "retracted",
                1_700_000_000 * 10**9,
                1_700_000_001 * 10**9,
                7,
                None,
            ),
        )
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/v1/signals?severty=high", "did you mean severity?"),
        ("/api/v1/signals?severity=urgent", "one of critical, high, medium, low, info"),
        ("/api/v1/signals?limit=1001", "from 1 to 1000"),
        ("/api/v1/signals?cursor=", "1 to 1000 characters"),
        ("/api/v1/signals?trace_id=12", "32 hex digits"),
        ("/api/v1/signals?since=yesterday", "must be a time"),
        ("/api/v1/signals/xyz", "32 hex digits"),
        ("/api/v1/traces/xyz", "32 hex digits"),
        ("/api/v1/traces?has_signal=yes", "true or false"),
        ("/api/v1/traces?min_duration=5", "must be a duration"),
        ("/api/v1/rules/Bad%20Id", "1 to 128 characters"),
        ("/api/v1/rules?x=1", "there are none here"),
        ("/livez?x=1", "there are none here"),
        ("/api/v1/signals/summary?since=200&until=100", "exchange"),
        ("/api/v1/signals/summary?since=-30d&bucket=1s", "make bucket wider"),
    ],
)
async def test_bad_parameters_get_400_with_a_hint(path, words):
    client = Client()
    error = await client.get(path, 400)
    assert error["code"] == "bad_request"
    assert words in error["hint"]
    assert client.queries.asked == []


async def test_one_signal():
    client = Client()
    client.queries.signals_found = [signal(7)]
    assert (await client.get(f"/api/v1/signals/{7:032X}"))["rule_id"] == "payment"
    error = await client.get(f"/api/v1/signals/{8:032x}", 404)
    assert error["code"] == "not_found"
    assert "/api/v1/signals" in error["hint"]


async def test_summary():
    client = Client()
    start = 1_700_000_000 * 10**9
    client.queries.summary = [
        SummaryRow(start + 5 * MINUTE, "b", "low", 1, 1),
        SummaryRow(start, "a", "high", 2, 0),
        SummaryRow(start, "b", "high", 3, 1),
    ]
    answer = await client.get(
        "/api/v1/signals/summary?since=2023-11-14T22:13:20Z&until=2023-11-14T22:23:20Z&bucket=5m"
    )
    assert client.queries.asked == [("default", start, start + 10 * MINUTE, 5 * MINUTE)]
    assert (answer["total"], answer["retracted"]) == (6, 2)
    assert answer["by_rule"] == {"a": 2, "b": 4}
    assert answer["by_severity"] == {"critical": 0, "high": 5, "medium": 0, "low": 1, "info": 0}
    assert [b["total"] for b in answer["buckets"]] == [5, 1]
    assert answer["buckets"][0]["start"] == answer["since"] == "2023-11-14T22:13:20.000000000Z"
    assert answer["bucket_seconds"] == 300


async def test_summary_of_the_last_hour_by_default():
    client = Client()
    await client.get("/api/v1/signals/summary")
    ((_, since, until, bucket),) = client.queries.asked
    assert until - since == 60 * MINUTE
    assert bucket == MINUTE


def row(number, **more):
    start = 1_700_000_000 * 10**9 - number
    return {
        "trace_id": f"{number:032x}",
        "start": start,
        "end": start + 5,
        "duration_ns": 5,
        "spans": 2,
        **more,
    }


async def test_traces_in_pages_and_their_filters():
    client = Client()
    client.queries.traces_found = [row(n) for n in range(3)]
    answer = await client.get(
        "/api/v1/traces?service=shop&name=GET%20/cart&min_duration=250ms&since=5&has_signal=true&limit=2"
    )
    assert client.queries.asked[0][1] == TraceQuery("shop", "GET /cart", 250 * 10**6, 5, True, 2)
    assert [t["start"][-11:] for t in answer["traces"]] == [".000000000Z", ".999999999Z"]
    assert answer["searched_to"] is None
    client.queries.searched_to = 10**9 + 1
    answer = await client.get(f"/api/v1/traces?cursor={answer['next']}")
    assert client.queries.asked[1][1].cursor == answer["next"] == "7"
    assert answer["searched_to"] == "1970-01-01T00:00:01.000000001Z"


async def test_one_trace():
    client = Client()
    client.queries.traces_found = [
        row(1, resourceSpans=[], signals=[signal(1)], verdicts={"payment": "broken"})
    ]
    answer = await client.get(f"/api/v1/traces/{1:032x}")
    assert answer["signals"][0]["detected_at"].endswith("Z")
    assert answer["verdicts"] == {"payment": "broken"}
    assert "first span" in (await client.get(f"/api/v1/traces/{2:032x}", 404))["hint"]


async def test_the_tenant_is_the_callers():
    client = Client()
    client.queries.signals_found = [signal(1, tenant="acme")]
    assert len((await client.get("/api/v1/signals", X_Scope_OrgID="acme"))["signals"]) == 1
    assert (await client.get("/api/v1/signals"))["signals"] == []
    error = await client.get("/api/v1/signals", 400, X_Scope_OrgID="Acme!")
    assert "a tenant name is" in error["message"]


class Gate:
    async def caller(self, authorization, scope):
        if authorization == "Bearer op":
            return scope
        return await self.tenant(authorization)

    async def scraper(self, authorization):
        return None if authorization == "Bearer scrape" else Denied(403, "scrapers only")

    async def tenant(self, authorization):
        if authorization is None:
            return Denied(401, "send a bearer token")
        return "acme" if authorization == "Bearer acme" else Denied(403, "not for this")

    async def operator(self, authorization):
        return None if authorization == "Bearer op" else Denied(403, "operators only")


async def test_authentication():
    client = Client(authenticator=Gate())
    error = await client.get("/api/v1/signals", 401, X_Scope_OrgID="acme")
    assert error["message"] == "send a bearer token"
    assert client.headers["www-authenticate"] == "Bearer"
    await client.get("/api/v1/signals", 403, Authorization="Bearer x")
    await client.get("/api/v1/signals", Authorization="Bearer acme", X_Scope_OrgID="other")
    assert client.queries.asked[0][0] == "acme"
    await client.get("/api/performance/metrics", 403, Authorization="Bearer acme")
    await client.get("/api/performance/metrics", Authorization="Bearer op")
    await client.get("/api/v1/signals", Authorization="Bearer op", X_Scope_OrgID="other")
    assert client.queries.asked[1][0] == "other"
    await client.get("/metrics", 403, Authorization="Bearer acme")
    await client.get("/metrics", Authorization="Bearer scrape")
    for open_path in ("/livez", "/readyz", "/openapi.json", "/docs"):
        await client.get(open_path)


async def test_a_tenant_that_is_deleted_is_refused():
    client = Client(closed={"gone"})
    error = await client.get("/api/v1/signals", 403, X_Scope_OrgID="gone")
    assert "is deleted" in error["message"]
    await client.get("/api/v1/signals", X_Scope_OrgID="other")


RULE = {"name": "Payments", "severity": "high", "condition": "never { a }"}


async def test_a_rules_life():
    client = Client()
    created = await client.ask("PUT", "/api/v1/rules/pay.ment", 201, RULE)
    assert created == {"id": "pay.ment", **RULE, "etag": '"1"'}
    assert client.headers["etag"] == '"1"'
    assert await client.get("/api/v1/rules/pay.ment") == created
    assert (await client.get("/api/v1/rules"))["rules"] == [created]
    assert (await client.get("/api/v1/rules", X_Scope_OrgID="other"))["rules"] == []

    error = await client.ask("PUT", "/api/v1/rules/pay.ment", 428, RULE)
    assert 'If-Match: "1"' in error["hint"]
    assert client.headers["etag"] == '"1"'
    changed = await client.ask(
        "PUT", "/api/v1/rules/pay.ment", 200, {**RULE, "enabled": False}, If_Match='"1"'
    )
    assert changed["etag"] == '"2"'
    error = await client.ask("PUT", "/api/v1/rules/pay.ment", 412, RULE, If_Match='"1"')
    assert error["code"] == "precondition_failed"
    assert "read it again" in error["hint"]
    await client.ask("PUT", "/api/v1/rules/pay.ment", 200, RULE, If_Match="*")

    await client.ask("DELETE", "/api/v1/rules/pay.ment", 428)
    await client.ask("DELETE", "/api/v1/rules/pay.ment", 412, If_Match='"2"')
    assert await client.ask("DELETE", "/api/v1/rules/pay.ment", 204, If_Match='"3"') == b""
    await client.get("/api/v1/rules/pay.ment", 404)
    await client.ask("DELETE", "/api/v1/rules/pay.ment", 404, If_Match="*")
    await client.ask("PUT", "/api/v1/rules/pay.ment", 404, RULE, If_Match="*")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        ({"name": "x"}, "condition is missing"),
        ({"condition": 5}, "condition is of the wrong type: it must be text"),
        ({"condition": "a", "enabled": "yes"}, "it must be true or false"),
        ({"condition": "a", "labels": []}, "it must be an object"),
        ({"condition": "a", "severty": "low"}, "did you mean severity?"),
        ({"condition": "a", "id": "other"}, "leave it out"),
    ],
)
async def test_bad_rules_are_refused_before_the_store_is_asked(body, words):
    client = Client()
    error = await client.ask("PUT", "/api/v1/rules/a", 400, body)
    assert words in f"{error['message']}: {error['hint']}"
    assert client.queries.asked == []


async def test_errors_of_a_rule_are_listed():
    client = Client()
    body = {"condition": "never {\n payment > 3 }", "severity": "urgent"}
    error = await client.ask("PUT", "/api/v1/rules/a", 400, body)
    assert len(error["errors"]) == 2
    assert {"line", "column", "message", "hint"} == set(error["errors"][0])
    assert 2 in [fault["line"] for fault in error["errors"]]
    assert client.queries.saved == {}


async def test_rules_of_files_are_read_only():
    client = Client()
    client.queries.read_only = {"a"}
    for method, body in (("PUT", RULE), ("DELETE", None)):
        error = await client.ask(method, "/api/v1/rules/a", 409, body, If_Match="*")
        assert "shop.yaml" in error["message"]


@pytest.mark.parametrize("header", ["1", '"', '""', '"1" "2"', 'W/"1"'])
async def test_a_bad_if_match(header):
    client = Client()
    error = await client.ask("PUT", "/api/v1/rules/a", 400, RULE, If_Match=header)
    assert "with its quotes" in error["hint"]


async def test_validate():
    client = Client()
    path = "/api/v1/rules/validate"
    assert await client.ask("POST", path, 200, {"condition": "never { a }"}) == {
        "valid": True,
        "errors": [],
    }
    answer = await client.ask("POST", path, 200, {"condition": "never {\n  payment > 3 }"})
    assert answer["valid"] is False
    (error,) = answer["errors"]
    assert set(error) == {"line", "column", "message", "hint"}
    assert error["line"] == 2
    await client.ask("POST", path, 400, {"conditon": "a"})


async def test_test():
    client = Client()
    path = "/api/v1/rules/test"
    answer = await client.ask(
        "POST", path, 200, {"condition": "never { a }", "trace": {"resourceSpans": []}}
    )
    assert set(answer) == {"breach", "clause", "counts", "evidence"}
    assert client.queries.asked == [("never { a }", b'{"resourceSpans":[]}')]
    error = await client.ask("POST", path, 400, {"condition": "never {", "trace": {}})
    assert error["errors"][0]["line"] == 1
    await client.ask("POST", path, 400, {"condition": "a", "trace": "x"})


async def test_bodies_are_limited():
    client = Client(max_body_bytes=2000)
    error = await client.ask("POST", "/api/v1/rules/validate", 413, {"condition": "a" * 3000})
    assert "api.max_body_bytes" in error["hint"]


async def test_a_slow_query_is_a_503_and_not_a_hang():
    client = Client(query_timeout_seconds=0.05)
    client.queries.delay = 0.3
    error = await client.get("/api/v1/signals", 503)
    assert "longer than 0.05 s" in error["message"]
    assert client.headers["retry-after"] == "5"


async def test_queries_beyond_the_threads_wait():
    client = Client(query_threads=1, query_timeout_seconds=5)
    client.queries.delay = 0.05
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(Client.get, client, "/api/v1/signals")
    assert len(client.queries.asked) == 3


async def test_an_unexpected_failure_is_logged_and_told_without_details(caplog):
    client = Client()
    client.queries.error = RuntimeError("secret path /x")
    with caplog.at_level(logging.ERROR, "service.http"):
        error = await client.get("/api/v1/signals", 500)
    assert "secret" not in str(error)
    assert error["code"] == "internal_server_error"
    assert "secret path" in caplog.text


async def test_unknown_paths_and_methods():
    client = Client()
    error = await client.get("/api/v1/signal", 404)
    assert error["hint"] == "did you mean /api/v1/signals?"
    assert (await client.get("/nowhere/at/all/x", 404))["hint"] == "see /docs for what there is"
    error = await client.ask("DELETE", "/api/v1/signals", 405)
    assert "GET" in client.headers["allow"]
    assert "use GET" in error["hint"]
    await client.ask("OPTIONS", "/api/v1/signals", 405)
    await client.ask("HEAD", "/livez")


async def test_performance():
    client = Client()
    assert (await client.get("/api/performance/metrics"))["spanIngestionRate"] == 5.0
    assert len((await client.get("/api/performance/queue-stats"))["queues"]) == 2
    assert (await client.get("/api/performance/queue-stats/span-ingestion"))["currentSize"] == 1
    error = await client.get("/api/performance/queue-stats/span-ingest", 404)
    assert error["hint"] == "did you mean span-ingestion?"
    assert (await client.get("/api/performance/trace-windows")) == {"activeWindows": 2}
    assert (await client.get("/api/performance/system-stats")) == {"threads": 4}
    assert (await client.get("/api/performance/cache-stats"))["ruleContainers"]["hitCount"] == 1


async def test_health():
    client = Client()
    assert await client.get("/livez") == await client.get("/healthz") == {"status": "ok"}
    ready = await client.get("/readyz")
    assert ready == {"status": "ready", "components": {"ledger": {"status": "ok", "detail": ""}}}
    client.backend.ready = False
    assert (await client.get("/readyz", 503))["status"] == "not ready"


async def test_metrics():
    client = Client()
    assert b"betrace_open_traces 3" in await client.get("/metrics")
    assert client.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("HEAD", "/metrics", 200),
        ("GET", "/x", 404),
        ("POST", "/metrics", 405),
    ],
)
async def test_the_listener_for_metrics_alone(method, path, status):
    sent = []

    async def send(message):
        sent.append(message)

    app = metrics_app(ScriptedBackend())
    await app({"type": "http", "method": method, "path": path}, None, send)
    assert sent[0]["status"] == status
    assert (b"betrace_open_traces" in sent[1]["body"]) is (status == 200)
    await app({"type": "websocket"}, None, send)
    assert sent[-1]["type"] == "websocket.close"


async def test_documentation():
    client = Client()
    document = await client.get("/openapi.json")
    page = (await client.get("/docs")).decode()
    for endpoint in all_endpoints():
        assert endpoint.method.lower() in document["paths"][endpoint.path]
        assert endpoint.path in page
    assert "http://" not in page  # nothing external
    assert "https://" not in page
    assert "src=" not in page
    assert await client.get("/", 302) == b""
    assert client.headers["location"] == "/docs"


def test_every_route_is_in_the_openapi_document():
    app = create_api(ScriptedBackend())
    paths = openapi()["paths"]
    routes = {
        (rule.rule.replace("<", "{").replace(">", "}"), method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert routes == {(path, method) for path, item in paths.items() for method in item}


def test_the_openapi_document_is_consistent():
    operations = [op for item in openapi()["paths"].values() for op in item.values()]
    assert len({op["operationId"] for op in operations}) == len(operations)
    for path, item in openapi()["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            assert operation["responses"]
            names = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert names == [part[1:-1] for part in path.split("/") if part.startswith("{")]


def test_the_documentation_file_is_current_and_has_every_endpoint():
    text = (ROOT / "docs/http-api.md").read_text("utf-8")
    assert text == markdown()
    for endpoint in all_endpoints():
        assert f"`{endpoint.method} {endpoint.path}`" in text
        assert not endpoint.params or all(f"| `{p.name}` |" in text for p in endpoint.params)
