"""Browsers: preflights, and what a page may read of an answer."""

from __future__ import annotations

import httpx
import pytest

from betrace.service.config.load import ConfigError, load
from tests.support.http_requests import ScriptedQueue
from tests.support.ingest_servers import listening

ORIGIN = "https://shop.example"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "content-type",
}


async def ask(server, method="OPTIONS", path="/v1/traces", **headers):
    async with httpx.AsyncClient() as client:
        body = b"{}" if method == "POST" else None
        return await client.request(method, server.url + path, headers=headers, content=body)


async def test_a_preflight_is_answered():
    async with listening(cors_origins=[ORIGIN]) as server:
        answer = await ask(server, **PREFLIGHT)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert "content-type" in answer.headers["access-control-allow-headers"]
        assert answer.headers["vary"] == "origin"
        private = {"access-control-request-private-network": "true"}
        answer = await ask(server, **PREFLIGHT, **private)
        assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origins", [[], ["https://shop.example:8443"], ["http://shop.example"]])
async def test_other_origins_are_refused_with_a_line_in_the_log(origins, caplog):
    async with listening(cors_origins=origins) as server:
        answer = await ask(server, **PREFLIGHT)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert f"pages of {ORIGIN} may not send here; add it to ingest.cors_origins" in caplog.text


async def test_any_origin():
    async with listening(cors_origins=["*"]) as server:
        assert (await ask(server, **PREFLIGHT)).status_code == 204


async def test_what_is_no_preflight_is_not_allowed():
    async with listening(cors_origins=[ORIGIN]) as server:
        assert (await ask(server)).status_code == 405
        assert (await ask(server, path="/v1/logs", **PREFLIGHT)).status_code == 404


async def test_a_page_may_read_the_answer_and_when_to_come_again():
    queue = ScriptedQueue()
    kind = {"content-type": "application/json"}
    async with listening(queue=queue, cors_origins=[ORIGIN]) as server:
        answer = await ask(server, "POST", origin=ORIGIN, **kind)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-expose-headers"] == "retry-after"
        for other in ({}, {"origin": "https://other.example"}):
            answer = await ask(server, "POST", **kind, **other)
            assert answer.status_code == 200
            assert "access-control-allow-origin" not in answer.headers
        queue.fill = 1.0
        answer = await ask(server, "POST", origin=ORIGIN, **kind)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        assert answer.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    "origin", ["shop.example", "https://shop.example/", "https://Shop.example", "https://a b", ""]
)
def test_origins_are_checked(origin):
    with pytest.raises(ConfigError, match="is not an origin"):
        load(None, {"ingest.cors_origins": [origin]})


def test_any_origin_needs_authentication_off():
    load(None, {"ingest.cors_origins": ["*"]})
    with pytest.raises(ConfigError, match="name the origins"):
        load(
            None,
            {
                "ingest.cors_origins": ["*"],
                "auth.enabled": True,
                "auth.operator_token": "x" * 20,
            },
        )
