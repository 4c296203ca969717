"""Event streams over a real connection, and how connections end."""

import json
from dataclasses import replace

import pytest
import trio

from betrace.service.api.app import create_api
from betrace.service.api.endpoint import event
from betrace.service.api.endpoints import performance, signals
from betrace.service.signals import Kind, Signal
from tests.support.http_requests import serving
from tests.support.inprocess import opened, settings


class EventClient:
    """Reads server-sent events. Uses HTTP/1.0, so that the answer is not chunked."""

    @classmethod
    async def open(cls, server, path, *headers):
        self = cls()
        self.raw = await server.connect()
        request = "\r\n".join([f"GET {path} HTTP/1.0", "host: x", *headers])
        await self.raw.send(request.encode() + b"\r\n\r\n")
        self.head = await self._until(b"\r\n\r\n")
        self.status = int(self.head.split()[1])
        return self

    async def next(self):
        """(name, data, id) of the next event, or the text of a comment."""
        text = (await self._until(b"\n\n")).decode()
        if text.startswith(":"):
            return text[1:].strip()
        fields = dict(line.split(": ", 1) for line in text.splitlines())
        return fields["event"], json.loads(fields["data"]), fields.get("id")

    async def rest(self):
        """Everything until the connection ends."""
        with trio.fail_after(60), pytest.raises(ConnectionError):
            await self._until(b"\0")
        return self.raw.buffer

    async def close(self):
        await trio.aclose_forcefully(self.raw.stream)

    async def _until(self, mark):
        with trio.fail_after(60):
            while mark not in self.raw.buffer:
                await self.raw._more()
        found, _, self.raw.buffer = self.raw.buffer.partition(mark)
        return found


async def subscribed(service, number=1):
    """Return when so many listeners are there."""
    with trio.fail_after(60):
        while len(service.subscriptions._open) != number:
            await trio.sleep(0.01)


def signal(number, severity="high"):
    return Signal(
        id=f"{number:032x}",
        tenant="acme",
        rule_id="payment",
        rule_version="v",
        severity=severity,
        kind=Kind.RAISED,
        clause="never",
        trace_id="1" * 32,
        detected_at=1_700_000_000_123_456_789,
        early=False,
        counts={},
        evidence={},
        message="broken",
    )


@pytest.fixture
async def app(service):
    return create_api(service.tools, None, ())


STREAM = "/api/v1/signals/stream"


async def test_signals_are_streamed_as_they_are_stored(app, service):
    async with serving(app) as server:
        query = "?severity=high&service=bank"
        client = await EventClient.open(server, STREAM + query, "x-scope-orgid: acme")
        assert b"content-type: text/event-stream" in client.head
        assert await client.next() == "connected"
        await subscribed(service)
        wanted = replace(signal(2), context={"service": "bank"})
        service.subscriptions.publish([signal(1, severity="low"), signal(3), wanted])
        name, data, identity = await client.next()
        assert (name, data["id"], identity) == ("signal", f"{2:032x}", f"{2:032x}")
        assert data["detected_at"] == "2023-11-14T22:13:20.123456789Z"
        service.subscriptions.close()  # the service stops
        assert await client.rest() == b""


async def test_pages_have_a_stream_of_their_own(app, service):
    async with serving(app) as server:
        client = await EventClient.open(server, "/live?tenant=acme")
        assert b"content-type: text/event-stream" in client.head
        assert await client.next() == "connected"
        await subscribed(service)
        service.subscriptions.publish([signal(2)])
        name, data, _ = await client.next()
        assert (name, data["rule_id"]) == ("signal", "payment")
        await client.close()
        await subscribed(service, 0)


async def test_a_client_that_leaves_is_unsubscribed(app, service):
    async with serving(app) as server:
        client = await EventClient.open(server, STREAM)
        await subscribed(service)
        await client.close()
        await subscribed(service, 0)


async def test_comments_are_sent_during_silence(app, monkeypatch):
    monkeypatch.setattr(signals, "KEEP_ALIVE", 0.02)
    async with serving(app) as server:
        client = await EventClient.open(server, STREAM)
        comments = [await client.next() for _ in range(3)]
        assert comments == ["connected", "still here", "still here"]


async def test_streams_are_limited(tmp_path):
    config = settings(tmp_path, api={"max_streams": 1})
    with opened(config) as service:
        async with serving(create_api(service.tools, None, ())) as server:
            first = await EventClient.open(server, STREAM)
            await first.next()
            second = await EventClient.open(server, STREAM)
            assert second.status == 503
            assert b"retry-after: 5" in second.head
            assert b"api.max_streams" in await second.rest()
            await first.close()
            status = 503
            with trio.fail_after(60):
                while status != 200:  # until the server notices that the first is closed
                    client = await EventClient.open(server, STREAM)
                    status = client.status
                    await client.close()


async def test_performance_is_streamed_in_snapshots(app, monkeypatch):
    monkeypatch.setattr(performance, "SNAPSHOT_SECONDS", 0.02)
    parts = {"metrics", "queues", "caches", "traceWindows", "system"}
    parts |= {"breakers", "pipeline", "ready", "components"}
    async with serving(app) as server:
        client = await EventClient.open(server, "/api/performance/stream")
        assert await client.next() == "connected"
        for _ in range(2):
            name, data, _ = await client.next()
            assert (name, set(data)) == ("snapshot", parts)


async def test_open_streams_do_not_delay_the_shutdown(app, service):
    with trio.fail_after(60):
        async with serving(app, grace_seconds=0.2) as server:
            client = await EventClient.open(server, STREAM)
            await subscribed(service)
            server.shutdown.set()
            await client.rest()


async def test_connection_close_is_obeyed(app):
    async with serving(app) as server:
        client = await server.connect()
        await client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await client.response())[0] == 200
        assert await client.closed()


async def test_a_kept_connection_serves_pipelined_requests_and_times_out(app):
    async with serving(app, keep_alive_seconds=0.1) as server:
        client = await server.connect()
        await client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 5)
        assert [(await client.response())[0] for _ in range(5)] == [200] * 5
        assert await client.closed()


def test_an_event_is_one_line_of_data():
    assert event("a", {"text": "x\ny"}, "1") == b'id: 1\nevent: a\ndata: {"text":"x\\ny"}\n\n'
