"""Checks that all endpoints share: parameters, bodies, callers, timeouts, errors."""

import logging
import time

import pytest
import trio
from werkzeug.datastructures import Headers

from betrace.service.pipeline.request import Done
from betrace.service.storage.duck.schema import StoreError
from betrace.service.tenancy.authentication import Denied
from tests.support.api_client import ApiClient
from tests.support.inprocess import closed, opened, put_rule, running, send, settings
from tests.support.spans import S

RULE = {"name": "Payments", "severity": "high", "condition": "never { a }"}


@pytest.fixture
def blocked(service, monkeypatch):
    """Fails the test if the store is queried."""

    def signals(*_, **__):
        pytest.fail("the store was queried")

    for name in ("signals", "signal", "summary", "traces", "trace"):
        monkeypatch.setattr(service.store, name, signals)


@pytest.mark.usefixtures("blocked")
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
        ("/api/v1/rules?x=1", "remove it"),
        ("/livez?x=1", "remove it"),
        ("/api/v1/signals/summary?since=200&until=100", "swap them"),
        ("/api/v1/signals/summary?since=-30d&bucket=1s", "a wider bucket"),
    ],
)
async def test_invalid_parameters_get_400_with_a_hint(client, path, words):
    error = await client.get(path, 400)
    assert error["code"] == "bad_request"
    assert words in error["hint"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        ({"name": "x"}, "condition is missing"),
        ({"condition": 5}, "condition has the wrong type: it must be text"),
        ({"condition": "a", "enabled": "yes"}, "it must be true or false"),
        ({"condition": "a", "labels": []}, "it must be an object"),
        ({"condition": "a", "severty": "low"}, "did you mean severity?"),
        ({"condition": "a", "id": "other"}, "omit it from the body"),
    ],
)
async def test_invalid_bodies_get_400_with_a_hint(client, service, body, words):
    error = await client.ask("PUT", "/api/v1/rules/a", 400, body)
    assert words in f"{error['message']}: {error['hint']}"
    assert service.registry.store.rules("default") == ()


async def test_too_large_bodies_get_413(tmp_path):
    with opened(settings(tmp_path, api={"max_body_bytes": 2000})) as service:
        body = {"condition": "a" * 3000}
        error = await ApiClient(service).post("/api/v1/rules/validate", 413, body)
        assert "api.max_body_bytes" in error["hint"]


class Authenticator:
    async def caller(self, authorization, scope, *, reads):
        if authorization is None:
            return Denied(401, "send a bearer token")
        if authorization == "Bearer op":
            return scope
        return "acme" if authorization == "Bearer acme" else Denied(403, "not for this")

    async def scraper(self, authorization):
        return None if authorization == "Bearer scrape" else Denied(403, "scrapers only")

    async def operator(self, authorization, *, reads):
        return None if authorization == "Bearer op" else Denied(403, "operators only")


async def test_each_kind_of_endpoint_checks_its_callers(service):
    client = ApiClient(service, Authenticator())
    for tenant in ("acme", "other"):
        await put_rule(service, tenant, tenant, {"condition": "never { a }"})

    async def rules(**headers):
        return [rule["id"] for rule in (await client.get("/api/v1/rules", **headers))["rules"]]

    error = await client.get("/api/v1/rules", 401, X_Scope_OrgID="acme")
    assert error["message"] == "send a bearer token"
    assert client.headers["www-authenticate"] == "Bearer"
    await client.get("/api/v1/rules", 403, Authorization="Bearer x")
    assert await rules(Authorization="Bearer acme", X_Scope_OrgID="other") == ["acme"]
    assert await rules(Authorization="Bearer op", X_Scope_OrgID="other") == ["other"]
    await client.get("/api/performance/metrics", 403, Authorization="Bearer acme")
    await client.get("/api/performance/metrics", Authorization="Bearer op")
    await client.post("/api/admin/pipeline/pause", 403, Authorization="Bearer acme")
    assert service.admission.state == "open"
    await client.get("/metrics", 403, Authorization="Bearer acme")
    await client.get("/metrics", Authorization="Bearer scrape")
    await client.get("/readyz", 503)
    for public in ("/livez", "/openapi.json", "/docs"):
        await client.get(public)


async def test_without_authentication_the_header_names_the_tenant(client, service):
    await put_rule(service, "acme", "r", {"condition": "never { a }"})
    assert len((await client.get("/api/v1/rules", X_Scope_OrgID="acme"))["rules"]) == 1
    assert (await client.get("/api/v1/rules"))["rules"] == []
    error = await client.get("/api/v1/signals", 400, X_Scope_OrgID="Acme!")
    assert "a tenant name is" in error["message"]


async def test_a_deleted_tenant_gets_403(client, service):
    service.gate.closed.add("gone")
    error = await client.get("/api/v1/signals", 403, X_Scope_OrgID="gone")
    assert "was deleted" in error["message"]
    await client.get("/api/v1/signals", X_Scope_OrgID="other")


def slow(monkeypatch, service, seconds):
    """Make queries slow; returns how many were made."""
    asked = []

    def signals(*_, **__):
        asked.append(1)
        time.sleep(seconds)
        return [], None

    monkeypatch.setattr(service.store, "signals", signals)
    return asked


async def test_a_slow_query_gets_503(tmp_path, monkeypatch):
    with opened(settings(tmp_path, api={"query_timeout_seconds": 0.05})) as service:
        slow(monkeypatch, service, 0.3)
        client = ApiClient(service)
        error = await client.get("/api/v1/signals", 503)
        assert "longer than 0.05 s" in error["message"]
        assert client.headers["retry-after"] == "5"


async def test_queries_wait_for_a_free_thread(tmp_path, monkeypatch):
    config = settings(tmp_path, api={"query_threads": 1, "query_timeout_seconds": 5})
    with opened(config) as service:
        asked = slow(monkeypatch, service, 0.02)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ApiClient(service).get, "/api/v1/signals")
        assert len(asked) == 3


async def test_an_unexpected_error_is_logged_and_its_details_are_not_sent(
    client, service, monkeypatch, caplog
):
    def fails(*_, **__):
        raise RuntimeError("secret path /x")

    monkeypatch.setattr(service.store, "signals", fails)
    with caplog.at_level(logging.ERROR, "service.http"):
        error = await client.get("/api/v1/signals", 500)
    assert "secret" not in str(error)
    assert error["code"] == "internal_server_error"
    assert "secret path" in caplog.text


async def test_an_unavailable_store_gets_503(client, service, monkeypatch):
    def fails(*_, **__):
        raise StoreError("away", transient=True)

    monkeypatch.setattr(service.store, "signals", fails)
    error = await client.get("/api/v1/signals", 503)
    assert "store cannot answer: away" in error["message"]
    assert client.headers["retry-after"] == "5"


async def test_unknown_paths_and_methods(client):
    error = await client.get("/api/v1/signal", 404)
    assert error["hint"] == "did you mean /api/v1/signals?"
    assert (await client.get("/nowhere/at/all/x", 404))["hint"] == "see /docs for all paths"
    error = await client.ask("DELETE", "/api/v1/signals", 405)
    assert error["message"] == "DELETE is not allowed on /api/v1/signals"
    assert "GET" in client.headers["allow"]
    assert "use GET" in error["hint"]
    await client.ask("OPTIONS", "/api/v1/signals", 405)
    await client.ask("HEAD", "/livez")


async def test_two_tenants_or_tokens_are_refused(tmp_path):
    with opened(settings(tmp_path)) as service:
        twice = Headers([("X-Scope-OrgID", "acme"), ("X-Scope-OrgID", "beta")])
        answer = await ApiClient(service).client.get("/api/v1/signals", headers=twice)
        assert answer.status_code == 400
        assert "'acme, beta' is not a tenant name" in await answer.get_data(as_text=True)
    auth = {"enabled": True, "operator_token": "o" * 32}
    with opened(settings(tmp_path / "second", auth=auth)) as service:
        for value, status in (("Bearer " + "o" * 32, 200), ("Bearer x", 403)):
            headers = Headers([("Authorization", value)])
            answer = await ApiClient(service).client.get("/api/admin/breakers", headers=headers)
            assert answer.status_code == status
        headers.add("Authorization", "Bearer " + "o" * 32)
        answer = await ApiClient(service).client.get("/api/admin/breakers", headers=headers)
        assert answer.status_code == 403


@pytest.mark.also_on_cluster
async def test_a_trace_whose_spans_end_before_they_start_has_no_duration(tmp_path):
    async with running(settings(tmp_path)) as service:
        assert await send(service, [S(1, start=9, end=2)]) == Done(1)
        await closed(service)
        (trace,) = (await ApiClient(service).get("/api/v1/traces"))["traces"]
        assert trace["duration_ns"] == 0
