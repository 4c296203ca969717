"""Health, metrics, and the listener for metrics alone."""

import pytest

from betrace.service.api.metrics.listener import metrics_app
from tests.support.api_client import ApiClient
from tests.support.inprocess import opened, running, settings


@pytest.mark.also_on_cluster
async def test_health(tmp_path):
    async with running(settings(tmp_path)) as service:
        client = ApiClient(service)
        assert await client.get("/livez") == await client.get("/healthz") == {"status": "ok"}
        ready = await client.get("/readyz")
        assert ready["status"] == "ready"
        assert ready["components"]["ledger"] == {
            "status": "ok",
            "detail": "sqlite; no hung clients",
        }


async def test_a_starting_service_is_not_ready(client):
    answer = await client.get("/readyz", 503)
    assert answer["status"] == "not ready"
    assert answer["components"]["service"] == {"status": "starting", "detail": "starting"}


async def test_metrics(client):
    assert b"betrace_open_traces 0" in await client.get("/metrics")
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
async def test_the_listener_for_metrics(tmp_path, method, path, status):
    sent = []

    async def send(message):
        sent.append(message)

    with opened(settings(tmp_path)) as service:
        app = metrics_app(service.tools.exposition, None)
        await app({"type": "http", "method": method, "path": path}, None, send)
    assert sent[0]["status"] == status
    assert (b"betrace_open_traces" in sent[1]["body"]) is (status == 200)
    await app({"type": "websocket"}, None, send)
    assert sent[-1]["type"] == "websocket.close"
