"""What only the ASGI application on Hypercorn does."""

from __future__ import annotations

import httpx

from tests.support.ingest_servers import listening, post


async def test_expect_100_continue_is_answered_before_the_refusal():
    async with listening("hypercorn") as server:
        client = await server.connect()
        await client.send(post(b"", "expect: 100-continue", "content-length: 30000000"))
        assert (await client.response())[0] == 100
        assert (await client.response())[0] == 413
    assert server.bodies == []


async def test_a_websocket_is_refused():
    async with listening("hypercorn") as server, httpx.AsyncClient() as client:
        answer = await client.get(
            server.url + "/v1/traces",
            headers={
                "connection": "Upgrade",
                "upgrade": "websocket",
                "sec-websocket-version": "13",
                "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
            },
        )
        assert answer.status_code == 403
