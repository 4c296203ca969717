"""The listener of the API: its connections are bounded and end with their clients."""

from __future__ import annotations

from functools import partial

import httpx
import pytest
import trio

from betrace.service.api import asgi
from tests.support.ingest_servers import until


async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        await asgi.lifespan(receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def servers(monkeypatch):
    """The servers that are created."""
    found = []
    created = asgi._ApiServer

    def create(*args):
        found.append(created(*args))
        return found[-1]

    monkeypatch.setattr(asgi, "_ApiServer", create)
    return found


async def start(nursery, shutdown, **options):
    url = await nursery.start(partial(asgi.serve, hello, "127.0.0.1:0", shutdown, **options))
    host, port = url.removeprefix("http://").split(":")
    return url, partial(trio.open_tcp_stream, host, int(port))


async def test_connections_that_their_clients_close_leave_nothing_behind(nursery, servers):
    shutdown = trio.Event()
    url, connect = await start(nursery, shutdown)
    for _ in range(50):
        await (await connect()).aclose()
    async with httpx.AsyncClient() as client:
        assert (await client.get(url)).text == "hello"
    await until(lambda: not servers[0]._connections)  # the idle time is 75 s
    shutdown.set()


async def test_connections_whose_clients_send_nothing_cost_little(nursery, servers, monkeypatch):
    made = []
    create = asgi._Connection

    def count(*args):
        made.append(create(*args))
        return made[-1]

    monkeypatch.setattr(asgi, "_Connection", count)
    shutdown = trio.Event()
    url, connect = await start(nursery, shutdown)
    for _ in range(20):
        await (await connect()).aclose()
    silent = await connect()
    async with httpx.AsyncClient() as client:
        assert (await client.get(url, timeout=60)).text == "hello"
    await until(lambda: len(servers[0]._connections) == 1)
    assert len(made) == 1
    shutdown.set()  # and they do not delay the stop
    assert await silent.receive_some() == b""
    await silent.aclose()
    await until(lambda: not servers[0]._connections)


async def test_a_client_that_sends_nothing_is_not_waited_for(nursery, servers):
    shutdown = trio.Event()
    _, connect = await start(nursery, shutdown, keep_alive_seconds=0.05)
    silent = await connect()
    assert await silent.receive_some() == b""
    await silent.aclose()
    shutdown.set()


async def test_idle_connections_make_room(nursery, servers):
    shutdown = trio.Event()
    url, connect = await start(nursery, shutdown, max_connections=5)
    kept = [await connect() for _ in range(20)]
    for stream in kept[:10]:
        await stream.send_all(b"GET / HT")  # half a head is idle too
    async with httpx.AsyncClient() as client:
        for _ in range(3):
            assert (await client.get(url, timeout=60)).text == "hello"
    assert len(servers[0]._connections) <= 5
    for stream in kept:
        await trio.aclose_forcefully(stream)
    shutdown.set()


async def test_running_out_of_descriptors_is_survived(nursery, servers, monkeypatch, caplog):
    import errno

    monkeypatch.setattr(asgi, "_EXHAUSTED_PAUSE", 0.01)
    failures = [OSError(errno.EMFILE, "Too many open files")] * 2

    real = trio._socket._SocketType.accept  # type: ignore[attr-defined]

    async def fail(self):
        if failures:
            raise failures.pop()
        return await real(self)

    monkeypatch.setattr(trio._socket._SocketType, "accept", fail)  # type: ignore[attr-defined]
    shutdown = trio.Event()
    url, _ = await start(nursery, shutdown)
    async with httpx.AsyncClient() as client:
        assert (await client.get(url, timeout=60)).text == "hello"
    assert "api.max_connections" in caplog.text
    shutdown.set()


async def test_a_listener_takes_only_its_share_of_descriptors(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 256))
    from betrace.service.receiver.sockets import most_connections

    assert most_connections(512, 4) == 64
    assert most_connections(1024, 2) == 128
    assert most_connections(10, 4) == 10
