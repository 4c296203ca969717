import json

import pytest
import trio

from betrace.service.api.app import create_api
from betrace.service.api.endpoint import event
from betrace.service.api.endpoints import performance, signals
from betrace.service.config.edge import Api
from tests.support.http_requests import serving
from tests.support.scripted_backend import ScriptedBackend, signal


class EventClient:
    """Reads server-sent events. It asks with HTTP/1.0, so that the answer is not in chunks."""

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
        """All that comes until the connection ends."""
        with trio.fail_after(5), pytest.raises(ConnectionError):
            await self._until(b"\0")
        return self.raw.buffer

    async def close(self):
        await trio.aclose_forcefully(self.raw.stream)

    async def _until(self, mark):
        with trio.fail_after(5):
            while mark not in self.raw.buffer:
                await self.raw._more()
        found, _, self.raw.buffer = self.raw.buffer.partition(mark)
        return found


async def subscribed(backend):
    with trio.fail_after(5):
        while not backend.feeds:
            await trio.sleep(0.01)
    return backend.feeds[0]


STREAM = "/api/v1/signals/stream"


async def test_signals_are_streamed_as_they_come():
    backend = ScriptedBackend()
    async with serving(create_api(backend)) as server:
        client = await EventClient.open(server, STREAM + "?severity=high", "x-scope-orgid: acme")
        assert b"content-type: text/event-stream" in client.head
        assert await client.next() == "connected"
        feed = await subscribed(backend)
        assert backend.subscribed == ["acme"]
        feed.send_nowait(signal(1, severity="low"))
        feed.send_nowait(signal(2))
        name, data, identity = await client.next()
        assert (name, data["id"], identity) == ("signal", f"{2:032x}", f"{2:032x}")
        assert data["detected_at"].endswith("Z")
        feed.close()  # the service stops
        assert await client.rest() == b""


async def test_a_client_that_leaves_is_unsubscribed():
    backend = ScriptedBackend()
    async with serving(create_api(backend)) as server:
        client = await EventClient.open(server, STREAM)
        feed = await subscribed(backend)
        await client.close()
        with trio.fail_after(5):
            while feed.statistics().open_receive_channels:
                await trio.sleep(0.01)


async def test_silence_is_filled_with_comments(monkeypatch):
    monkeypatch.setattr(signals, "KEEP_ALIVE", 0.02)
    async with serving(create_api(ScriptedBackend())) as server:
        client = await EventClient.open(server, STREAM)
        comments = [await client.next() for _ in range(3)]
        assert comments == ["connected", "still here", "still here"]


async def test_streams_are_limited():
    app = create_api(ScriptedBackend(), Api(max_streams=1))
    async with serving(app) as server:
        first = await EventClient.open(server, STREAM)
        await first.next()
        second = await EventClient.open(server, STREAM)
        assert second.status == 503
        assert b"retry-after: 5" in second.head
        assert b"api.max_streams" in await second.rest()
        await first.close()
        status = 503
        with trio.fail_after(5):
            while status != 200:  # until the place is free again
                client = await EventClient.open(server, STREAM)
                status = client.status
                await client.close()


async def test_performance_is_streamed_in_snapshots(monkeypatch):
    monkeypatch.setattr(performance, "SNAPSHOT_SECONDS", 0.02)
    parts = {"metrics", "queues", "caches", "traceWindows", "system"}
    parts |= {"breakers", "pipeline", "ready", "components"}
    async with serving(create_api(ScriptedBackend())) as server:
        client = await EventClient.open(server, "/api/performance/stream")
        assert await client.next() == "connected"
        for _ in range(2):
            name, data, _ = await client.next()
            assert (name, set(data)) == ("snapshot", parts)


async def test_open_streams_do_not_hold_up_the_shutdown():
    backend = ScriptedBackend()
    with trio.fail_after(8):
        async with serving(create_api(backend), grace_seconds=0.2) as server:
            client = await EventClient.open(server, STREAM)
            await subscribed(backend)
            server.shutdown.set()
            await client.rest()


async def test_a_connection_that_must_be_closed_is():
    async with serving(create_api(ScriptedBackend())) as server:
        client = await server.connect()
        await client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await client.response())[0] == 200
        assert await client.closed(5)


async def test_a_kept_connection_serves_pipelined_requests_and_times_out():
    async with serving(create_api(ScriptedBackend()), keep_alive_seconds=0.1) as server:
        client = await server.connect()
        await client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 5)
        assert [(await client.response())[0] for _ in range(5)] == [200] * 5
        assert await client.closed(5)


def test_an_event_is_one_line_of_data():
    assert event("a", {"text": "x\ny"}, "1") == b'id: 1\nevent: a\ndata: {"text":"x\\ny"}\n\n'
