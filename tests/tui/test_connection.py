"""The connection: loss, retry, polling, and errors at the start."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from betrace.tui import connection
from betrace.tui.app import run
from betrace.tui.client import ApiClient, ClientError
from betrace.tui.connection import Link, ServiceConnection
from tests.support.ingest_servers import write_certificate
from tests.support.tui_fake import T0, URL, FakeApi, piloted, refusal, screen_text, toasts, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(connection, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(connection, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(connection, "STREAM_AGAIN", 0.1)


@piloted()
async def test_a_lost_connection_keeps_stale_data_until_it_is_back(pilot, api):
    app = pilot.app
    assert "● connected since" in screen_text(app)
    await pilot.press("2")
    api.go_away()
    await until(lambda: app.connection.link.status == "lost")
    await pilot.pause()
    assert "✖ lost" in screen_text(app)
    assert "STALE since" in screen_text(app)
    assert "span-ingestion" in screen_text(app)
    del api.calls[:]
    api.down = False
    await until(lambda: app.connection.link.status == "connected")
    await pilot.pause()
    assert "STALE" not in screen_text(app)
    await until(lambda: ("GET", "/api/performance/stream") in api.calls)
    tried = [path for _, path in api.calls if path != "/readyz"]
    assert tried.index("/api/admin/pipeline") < tried.index("/api/performance/stream")


@piloted(down=True)
async def test_connecting_is_shown(pilot, api):
    assert "connecting" in screen_text(pilot.app) or "lost" in screen_text(pilot.app)
    await pilot.press("1", "2", "3", "4")
    api.down = False
    await until(lambda: "● connected since" in screen_text(pilot.app))


@piloted(streaming=False)
async def test_the_state_is_polled_without_a_stream(pilot, api):
    app = pilot.app
    await until(lambda: app.connection.link.polling)
    await pilot.pause()
    assert "(polling)" in screen_text(app)
    api.data["pipeline"]["ingestion"] = "paused"
    await until(lambda: app.state.now.ingestion == "paused")


@piloted(streaming=False)
async def test_the_stream_is_retried_while_polling(pilot, api):
    app = pilot.app
    await until(lambda: app.connection.link.polling)
    api.streaming = True
    await until(lambda: bool(api.streams))
    api.publish()
    await until(lambda: not app.connection.link.polling)


@piloted()
async def test_space_retries_the_connection_immediately(pilot, api):
    app = pilot.app
    connection.FIRST_PAUSE, before = 60.0, connection.FIRST_PAUSE
    try:
        api.go_away()
        await until(lambda: app.connection.link.status == "lost")
        api.down = False
        await pilot.press("space")
        await until(lambda: app.connection.link.status == "connected")
    finally:
        connection.FIRST_PAUSE = before


@piloted()
async def test_a_refused_refresh_is_reported(pilot, api):
    api.routes["GET", "/api/performance/metrics"] = refusal(403, "not for you", "see /docs")
    await pilot.press("space")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✖ refused", "not for you; see /docs")]


def test_pauses_double_up_to_the_maximum():
    async def measure() -> list[float]:
        api, links = FakeApi(), list[Link]()
        api.down = True
        async with ApiClient(URL, transport=httpx.MockTransport(api._handle)) as client:
            link = ServiceConnection(client, links.append, lambda _: None, api.clock)
            task = asyncio.create_task(link.run())
            await until(lambda: len(links) >= 3)
            task.cancel()
        return [round(each.retry_at - T0, 3) for each in links[:3]]

    assert asyncio.run(measure()) == [0.02, 0.04, 0.05]


def test_an_unreachable_service_prints_one_sentence_and_exits_with_3(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert run(url) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"no service answers at {url}" in said.err
    assert "start it with `betrace serve`, or give its API with --url" in said.err


def test_an_invalid_url_is_rejected(capsys):
    assert run("http://[") == 3
    assert "is not a URL" in capsys.readouterr().err


class Answering:
    """Replaces `betrace.tui.app.ApiClient` with a client of the fake."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api

    def __call__(
        self, url: str, token: str | None, tenant: str | None, ca: Path | None
    ) -> ApiClient:
        return ApiClient(url, token, tenant, transport=httpx.MockTransport(self.api._handle))


def test_a_wrong_token_is_reported_with_the_option_to_use(monkeypatch, capsys):
    api = FakeApi()
    api.routes["GET", "/api/performance/queue-stats"] = refusal(401, "no valid token", "see /docs")
    monkeypatch.setattr("betrace.tui.app.ApiClient", Answering(api))
    assert run(URL, "wrong", "shop") == 3
    assert "no valid token; see /docs; give the operator token" in capsys.readouterr().err
    sent = api.requests[0].headers
    assert sent["authorization"] == "Bearer wrong"
    assert sent["x-scope-orgid"] == "shop"
    assert sent["x-operator"]


def test_a_missing_terminal_is_reported(monkeypatch, capsys):
    monkeypatch.setattr("betrace.tui.app.ApiClient", Answering(FakeApi()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert run(URL) == 3
    assert "needs a terminal" in capsys.readouterr().err


def test_another_server_at_the_url_is_reported(monkeypatch, capsys):
    api = FakeApi()
    api.routes["GET", "/readyz"] = httpx.Response(200, text="<html>")
    monkeypatch.setattr("betrace.tui.app.ApiClient", Answering(api))
    assert run(URL) == 3
    assert "not a BeTrace API" in capsys.readouterr().err


def test_a_late_answer_is_a_timeout():
    async def read() -> ClientError:
        def late(request: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("late", request=request)

        async with ApiClient(URL, transport=httpx.MockTransport(late)) as client:
            with pytest.raises(ClientError) as found:
                await client.get("/readyz")
            return found.value

    assert asyncio.run(read()).kind == "timed out"


# https


@contextmanager
def https(certificate):
    """A server that answers every request with an empty object, in another thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_certificate_of_ones_own_is_trusted_if_named(tmp_path, capsys):
    certificate = write_certificate(tmp_path)
    with https(certificate) as url:

        async def ask() -> object:
            async with ApiClient(url, ca=Path(certificate.certificate)) as client:
                return await client.get("/readyz")

        assert asyncio.run(ask()) == {}
        assert run(url) == 3
        assert "name it or its CA with --ca FILE" in capsys.readouterr().err
    assert run(url, ca=Path(certificate.key)) == 3
    assert "has no certificates" in capsys.readouterr().err
