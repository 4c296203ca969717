"""The ingestion listener in detail: exact bytes, strictness, time limits, limits of connections,
and shutdown."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl

import pytest
import trio
import trio.testing
from google.rpc.status_pb2 import Status

from betrace.service.pipeline.request import Done, Refused
from betrace.service.receiver import http1
from betrace.service.receiver import server as listener
from tests.support.http_requests import ScriptedQueue
from tests.support.ingest_servers import MIB, chunk, listening, post, until, write_certificate

DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.fixture
def date(monkeypatch):
    monkeypatch.setattr(http1, "_date", http1.DateLine(lambda: 784111777.9))


@pytest.fixture(autouse=True)
def short_farewells(monkeypatch):
    monkeypatch.setattr("betrace.service.receiver.connection.LINGER_SECONDS", 0.4)


async def everything(client) -> bytes:
    """Everything that the server sends until it closes."""
    received = client.buffer
    with trio.fail_after(60):
        while part := await client.stream.receive_some():
            received += part
    return received


# Bytes


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (
            post(b"a", "connection: close"),
            b"HTTP/1.1 200 OK\r\ndate: %s\r\ncontent-type: application/x-protobuf\r\n"
            b"content-length: 0\r\nconnection: close\r\n\r\n",
        ),
        (
            b"HEAD /v1/traces HTTP/1.1\r\nHost: x\r\nConnection: x, Close\r\n\r\n",
            b"HTTP/1.1 405 Method Not Allowed\r\ndate: %s\r\ncontent-type: application/json\r\n"
            b"content-length: 42\r\nallow: POST\r\nconnection: close\r\n\r\n",
        ),
        (
            b"GET /v1/traces HTTP/1.0\r\n\r\n",
            b"HTTP/1.1 405 Method Not Allowed\r\ndate: %s\r\ncontent-type: application/json\r\n"
            b"content-length: 41\r\nallow: POST\r\nconnection: close\r\n\r\n"
            b'{"code":12,"message":"use POST, not GET"}',
        ),
        (
            b"get / HTTP/1.1\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ndate: %s\r\ncontent-type: application/json\r\n"
            b"content-length: 82\r\nconnection: close\r\n\r\n"
            b'{"code":3,"message":"this is not an HTTP/1.1 request: Invalid method encountered"}',
        ),
    ],
)
async def test_answers_to_the_byte(date, request_bytes, expected):
    async with listening() as server:
        client = await server.connect()
        await client.send(request_bytes)
        assert await everything(client) == expected % DATE


async def test_an_answer_that_keeps_the_connection_to_the_byte(date):
    async with listening(queue=ScriptedQueue(outcome=Refused(503, "later"))) as server:
        client = await server.connect()
        await client.send(post(b"a") * 2)
        await until(lambda: len(server.queue.taken) == 2)
        status = Status(code=14, message="later").SerializeToString()
        expected = (
            b"HTTP/1.1 503 Service Unavailable\r\ndate: %s\r\n"
            b"content-type: application/x-protobuf\r\ncontent-length: %d\r\nretry-after: 1\r\n"
            b"\r\n%s"
        ) % (DATE, len(status), status)
        server.shutdown.set()
        assert await everything(client) == expected * 2


# Strictness


HOST = "Host: x\r\n"
SMUGGLED = chunk(b"abc") + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 3",
        "Content-Length: 3\r\nContent-Length: 8",
        "Content-Length: 3, 3",
        "Content-Length: +3",
        "Content-Length: -3",
        "Content-Length: 0x3",
        "Content-Length: 3 3",
        "Content-Length:",
        "Content-Length: 18446744073709551616",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, gzip",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding: chun\r\n ked",
        "Transfer-Encoding:",
        "Content-Length : 3",
        " Content-Length: 3",
        "Transfer-Encoding : chunked",
        "X: a\r\n folded\r\nContent-Length: 3",
        "X: a\nContent-Length: 3",
        "X: a\rContent-Length: 3",
        "X: a\x00b\r\nContent-Length: 3",
        ": empty\r\nContent-Length: 3",
        "no colon\r\nContent-Length: 3",
        "Content-Length: 3\r\nHost: y",
    ],
)
async def test_requests_with_an_ambiguous_end_are_refused(headers):
    request = f"POST /v1/traces HTTP/1.1\r\n{HOST}{headers}\r\n\r\n".encode("latin-1") + SMUGGLED
    async with listening() as server:
        client = await server.connect()
        await client.send(request + post(b"smuggled"))
        status, answer, body = await client.response()
        assert (status, answer["connection"]) == (400, "close")
        assert answer["content-type"] == "application/json"
        assert b'"code":3' in body
        assert await everything(client) == b""
    assert server.bodies == []
    assert server.admission.refusals.requests["malformed"] == 1


@pytest.mark.parametrize(
    "body",
    [
        b"3\nabc\r\n0\r\n\r\n",
        b"3 \r\nabc\r\n0\r\n\r\n",
        b" 3\r\nabc\r\n0\r\n\r\n",
        b"+3\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"10000000000000003\r\nabc\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\n",
        b"3;\nx\r\nabc\r\n0\r\n\r\n",
        b"3;x\nabc\r\n0\r\n\r\n",
        b"\r\n3\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\r\n0\r\nContent-Length: 7\r\n\r\n",
        b"3\r\nabc\r\n0\r\nTrailer : x\r\n\r\n",
        b"3\r\nabc\r\n0\r\nA: b\n\r\n",
        b"3\r\nabc\r\n0\r\n\n",
    ],
)
async def test_chunks_with_an_ambiguous_end_are_refused(body):
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + body + post(b"smuggled"))
        status, answer, _ = await client.response()
        assert (status, answer["connection"]) == (400, "close")
        assert await everything(client) == b""
    assert server.bodies == []


async def test_chunk_extensions_and_trailers_are_dropped_and_do_not_end_the_body():
    data = b"\r\n\r\nPOST /v1/traces HTTP/1.1\r\n\r\n0\r\n\r\n"
    body = b'%X;a=b;c\r\n%s\r\n00;z="1"\r\nX: y\r\nZ: 0\r\n\r\n' % (len(data), data)
    request = post(b"", "Transfer-Encoding: Chunked") + body + post(b"next")
    async with listening() as server:
        client = await server.connect()
        await client.send(request)
        assert [(await client.response())[0] for _ in range(2)] == [200, 200]
        for byte in request:  # and however it arrives
            await client.send(bytes([byte]))
        assert [(await client.response())[0] for _ in range(2)] == [200, 200]
    assert server.bodies == [data, b"next"] * 2


@pytest.mark.parametrize(
    "endless",
    [b"3;" + b"x" * 100_000, b"0\r\n" + b"A: b\r\n" * 20_000, b"0\r\nA: " + b"b" * 100_000],
)
async def test_endless_extensions_and_trailers_are_cut_off(endless):
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + endless)
        assert (await client.response())[0] == 431
        assert await client.closed()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/0.9", 505),
        (b"GET /", 505),
        (b"GET / HTTP/1.2", 400),
        (b"PRI * HTTP/2.0", 400),
        (b"FOO / HTTP/1.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET /\xff HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
async def test_invalid_request_lines(line, expected):
    async with listening() as server:
        client = await server.connect()
        await client.send(line + b"\r\nHost: x\r\n\r\n")
        assert (await client.response())[0] == expected
        assert await client.closed()


async def test_an_invalid_head_is_refused_before_its_end():
    async with listening() as server:
        client = await server.connect()
        await client.send(b"\x16\x03\x01")  # a TLS client hello
        status, _, body = await client.response()
        assert status == 400
        assert b"TLS" in body


@pytest.mark.parametrize("count", [98, 99])
async def test_a_hundred_headers_are_the_most(count):
    headers = b"".join(b"x-%d: y\r\n" % i for i in range(count))
    request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + headers + b"\r\n"
    async with listening() as server:
        client = await server.connect()
        await client.send(request)
        status, _, body = await client.response()
        assert status == (404 if count == 98 else 431)
        assert (b"100 headers" in body) is (count == 99)


@pytest.mark.parametrize(("size", "expected"), [(32 * 1024, 404), (32 * 1024 + 1, 431)])
@pytest.mark.parametrize("piece", [100_000, 10_000])
async def test_a_head_of_32_kib_is_the_largest(size, expected, piece):
    start = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\nbig: "
    request = start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"
    async with listening() as server:
        client = await server.connect()
        for at in range(0, size, piece):
            await client.send(request[at : at + piece])
            await trio.sleep(0.01)
        assert (await client.response())[0] == expected


async def test_a_head_that_comes_byte_by_byte_after_empty_lines():
    async with listening() as server:
        client = await server.connect()
        for byte in b"\r\n\r\n\r\n" + post(b"ab") + b"\r\n" + post(b"c"):
            await client.send(bytes([byte]))
            await trio.sleep(0)
        assert [(await client.response())[0] for _ in range(2)] == [200, 200]
    assert server.bodies == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://other.example:99/v1/traces?x=http://y", 200),
        ("/v1/traces?http://x", 200),
        ("http://other.example", 404),
        ("/v1/tr%61ces", 404),
        ("/v1/traces/", 404),
        ("//v1/traces", 404),
        ("*", 404),
    ],
)
async def test_forms_of_the_target(target, expected):
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"a", path=target))
        assert (await client.response())[0] == expected


async def test_http_1_0_is_answered_and_ended_and_has_no_chunks():
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"a", "connection: keep-alive", version="1.0"))
        status, headers, _ = await client.response()
        assert (status, headers["connection"]) == (200, "close")
        assert await client.closed()
        client = await server.connect()
        await client.send(post(SMUGGLED, "transfer-encoding: chunked", version="1.0"))
        assert (await client.response())[0] == 400
    assert server.bodies == [b"a"]


@pytest.mark.parametrize(
    "offer",
    [
        ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk"),
        ("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13"),
    ],
)
async def test_an_upgrade_is_ignored(offer):
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"abc", *offer))
        await client.send(post(SMUGGLED, "transfer-encoding: chunked", *offer) + post(b"d"))
        assert [(await client.response())[0] for _ in range(3)] == [200, 200, 200]
        await client.send(b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.response())[0] == 404
    assert server.bodies == [b"abc", b"abc", b"d"]


# Expectations and refusals


async def test_a_refusal_answers_an_expectation_and_ends_the_connection():
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"", "expect: 100-continue", "content-length: 30000000"))
        status, headers, _ = await client.response()  # not 100
        assert (status, headers["connection"]) == (413, "close")
        assert await client.closed()


async def test_a_client_that_sends_its_body_gets_no_100_continue():
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"abc", "expect: 100-continue", "content-length: 6"))
        await trio.sleep(0.02)
        await client.send(b"def")
        assert (await client.response())[0] == 200  # no 100 before it
        await client.send(post(b"", "Expect: 100-Continue", "transfer-encoding: chunked"))
        assert (await client.response())[0] == 100
        await client.send(SMUGGLED)
        assert (await client.response())[0] == 200
    assert server.bodies == [b"abcdef", b"abc"]


async def test_a_huge_refused_body_is_not_read_to_its_end():
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"", "content-length: 1000000000000"))
        status, headers, _ = await client.response()
        assert (status, headers["connection"]) == (413, "close")
        sent = 0
        with trio.fail_after(60), contextlib.suppress(trio.BrokenResourceError):
            while sent < 200 * MIB:
                await client.send(bytes(MIB))
                sent += MIB
        assert 20 * MIB < sent < 200 * MIB  # long enough for the client to read the answer


async def test_a_refused_chunked_body_that_becomes_invalid_gets_no_second_answer():
    async with listening(max_body_bytes=1024) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + chunk(bytes(2000)))
        assert (await client.response())[0] == 413
        await client.send(b"nonsense\r\n")
        assert await everything(client) == b""


# Slow clients


async def test_a_slow_head_gets_a_408():
    async with listening(head_timeout_seconds=0.2) as server:
        client = await server.connect()
        await client.send(b"POST /v1/traces HT")
        left = list(b"TP/1.1\r\n" * 10)
        with contextlib.suppress(trio.BrokenResourceError):
            while left:
                await trio.sleep(0.05)
                await client.send(bytes([left.pop()]))
        assert left
        status, headers, body = await client.response()
        assert (status, headers["connection"]) == (408, "close")
        assert b"in time" in body
    assert server.admission.refusals.requests["slow_head"] == 1


async def test_a_slow_chunked_body_gets_a_503():
    async with listening(body_timeout_seconds=0.2) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked"))
        with trio.move_on_after(0.5), contextlib.suppress(trio.BrokenResourceError):
            while True:
                await client.send(chunk(b"a"))
                await trio.sleep(0.02)
        status, headers, _ = await client.response()
        assert (status, headers["connection"]) == (503, "close")
        assert await client.closed()
    assert server.admission.refusals.requests["slow_body"] == 1


async def test_a_client_that_does_not_read_its_responses_is_disconnected(monkeypatch):
    monkeypatch.setattr("betrace.service.receiver.connection.SEND_SECONDS", 0.1)
    queue = ScriptedQueue(outcome=Refused(400, "x" * 500_000))
    async with listening(queue=queue, head_timeout_seconds=0.2) as server:
        client = await server.connect()
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(20):
            await client.send(post(b"a"))
        await until(lambda: len(queue.taken) > 1)
        with trio.fail_after(60):
            while True:
                taken = len(queue.taken)
                await trio.sleep(0.5)
                if len(queue.taken) == taken:
                    break
        assert await client.closed()
    assert len(queue.taken) < 20


async def test_an_outcome_that_is_too_late_is_a_503():
    async with listening(queue=ScriptedQueue(outcome=None), answer_timeout_seconds=0.1) as server:
        client = await server.connect()
        await client.send(post(b"abc"))
        status, headers, body = await client.response()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "5", "close")
        assert "not written yet" in Status.FromString(body).message
        assert await client.closed()
    assert server.admission.refusals.requests["unavailable"] == 1


async def test_waiting_for_the_pipeline_does_not_count_against_the_client():
    limits = {"keep_alive_seconds": 1, "head_timeout_seconds": 1, "body_timeout_seconds": 1}
    async with listening(queue=ScriptedQueue(outcome=None), **limits) as server:
        client = await server.connect()
        await client.send(post(b"abc"))
        await until(lambda: server.queue.taken)
        await trio.sleep(2)
        server.queue.taken[0].reply.set(Done(1))
        assert (await client.response())[0] == 200


async def test_a_large_body_in_small_pieces_wakes_its_task_few_times(monkeypatch):
    waits = []
    wait_readable = trio.lowlevel.wait_readable

    async def counted(descriptor):
        waits.append(descriptor)
        await wait_readable(descriptor)

    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"first"))
        assert (await client.response())[0] == 200
        body = bytes(range(256)) * 1000
        request = post(body)
        monkeypatch.setattr(trio.lowlevel, "wait_readable", counted)
        for start in range(0, len(request), 4000):
            await client.send(request[start : start + 4000])
            await trio.sleep(0.001)
        assert len(waits) < 12  # and not 65
        await client.send(post(b"next"))  # wakes at its first byte again
        assert [(await client.response())[0] for _ in range(2)] == [200, 200]
    assert server.bodies == [b"first", body, b"next"]


# Connections


async def test_connections_above_the_limit_wait_for_one_that_ends(monkeypatch):
    monkeypatch.setattr(listener, "_SLOW_SECONDS", 3600)
    async with listening(max_connections=2) as server:
        first, second = [await server.connect() for _ in range(2)]
        for client in (first, second):
            await client.send(post(b"abc")[:-1])  # busy: the body is incomplete
        await until(lambda: server.admission.buffered_bytes == 4)
        third = await server.connect()
        await third.send(post(b"b"))
        await trio.sleep(0.05)
        assert server.bodies == []
        await first.stream.aclose()
        assert (await third.response())[0] == 200
    assert server.bodies == [b"b"]


async def test_the_connection_idle_longest_is_closed_for_the_next():
    async with listening(max_connections=2) as server:
        first, second = await server.connect(), await server.connect()
        for client in (first, second):
            await client.send(post(b"a"))
            assert (await client.response())[0] == 200
            await trio.sleep(0.01)
        third = await server.connect()
        await third.send(post(b"b"))
        assert (await third.response())[0] == 200
        assert await first.closed()
        await second.send(post(b"c"))
        assert (await second.response())[0] == 200


@pytest.mark.parametrize(
    "part",
    [post(b"", "content-length: 1000") + b"abc", b"POST /v1/traces HT"],
    ids=["body", "head"],
)
async def test_slow_connections_make_room_before_idle_ones(part, monkeypatch):
    monkeypatch.setattr(listener, "_SLOW_SECONDS", 0.1)
    async with listening(max_connections=10) as server:
        good = await server.connect()
        await good.send(post(b"a"))
        assert (await good.response())[0] == 200
        slow = [await server.connect() for _ in range(30)]
        for client in slow[:9]:
            await client.send(part)
        await trio.sleep(0.15)
        with trio.fail_after(60):
            for number in range(5):
                new = await server.connect()
                for client in slow[9:]:
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await client.send(part)
                await new.send(post(b"b%d" % number))
                assert (await new.response())[0] == 200
                await new.stream.aclose()
        await good.send(post(b"c"))
        assert (await good.response())[0] == 200


def test_the_client_with_most_slow_connections_loses_one_first():
    class One:
        def __init__(self, peer: str, slow_since: float) -> None:
            self.peer, self.slow_since, self.idle, self.ended = peer, slow_since, False, False

        def abandon(self) -> None:
            self.ended = True

    server = listener._Server.__new__(listener._Server)
    given = [One("a", -9), One("b", -8), One("b", -7), One("b", float("inf"))]
    server._connections, server._leaving, server._most = set(given), set(), 10

    async def main() -> None:
        server._make_room()

    trio.run(main, clock=trio.testing.MockClock(rate=0))
    assert [each.ended for each in given] == [False, True, False, False]
    assert server._leaving == {given[1]}
    given += [One("b", -number) for number in range(20, 30)]
    server._connections, server._most = set(given), 16 * 5
    trio.run(main, clock=trio.testing.MockClock(rate=0))
    assert sorted(each.slow_since for each in given if each.ended) == [-29, -28, -27, -26, -25, -8]


async def test_the_time_limit_of_heads_applies_to_tls_handshakes(tmp_path):
    tls = write_certificate(tmp_path)
    async with listening(tls=tls, head_timeout_seconds=0.2) as server:
        silent = await server.connect()
        assert await silent.closed()


class Exhausted:
    """A listening socket that runs out of descriptors, or whose clients have disconnected."""

    def __init__(self, real, errors):
        self._real, self._errors = real, errors

    def accept(self):
        if self._errors:
            raise OSError(self._errors.pop(), "out of something")
        return self._real.accept()

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._real.close()


async def test_running_out_of_descriptors_pauses(monkeypatch, caplog):
    errors = [errno.ECONNABORTED, errno.EMFILE]
    real = listener.listen
    monkeypatch.setattr(listener, "listen", lambda address: Exhausted(real(address), errors))
    monkeypatch.setattr(listener, "_EXHAUSTED_PAUSE", 0.01)
    with caplog.at_level(logging.WARNING):
        async with listening() as server:
            client = await server.connect()
            await client.send(post(b"a"))
            assert (await client.response())[0] == 200
    assert errors == []
    assert "limit of open files" in caplog.text
    assert len(caplog.records) == 1


async def test_a_bug_ends_only_its_connection(caplog):
    class Broken(ScriptedQueue):
        def send_nowait(self, item):
            raise ZeroDivisionError("on purpose")

    async with listening(queue=Broken()) as server:
        client = await server.connect()
        await client.send(post(b"a"))
        assert await client.closed()
        client = await server.connect()
        await client.send(post(b"a", path="/x"))
        assert (await client.response())[0] == 404
    assert "on purpose" in caplog.text


# Shutdown


async def test_at_shutdown_only_requests_in_progress_are_finished():
    async with listening(grace_seconds=50) as server:
        idle, used, heading, sending = [await server.connect() for _ in range(4)]
        await used.send(post(b"0"))
        assert (await used.response())[0] == 200
        await heading.send(post(b"1")[:30])
        await sending.send(post(b"2", "content-length: 2"))
        await until(lambda: server.admission.buffered_bytes)
        await trio.sleep(0.02)
        server.shutdown.set()
        assert await idle.closed()
        assert await used.closed()
        await heading.send(post(b"1")[30:] + post(b"not this"))
        await sending.send(b"2")
        for client in (heading, sending):
            status, headers, _ = await client.response()
            assert (status, headers["connection"]) == (200, "close")
            assert await client.closed()
    assert sorted(server.bodies) == [b"0", b"1", b"22"]


async def test_a_request_on_a_kept_connection_is_refused_at_shutdown():
    async with listening(grace_seconds=50) as server:
        used, refused = await server.connect(), await server.connect()
        for client in (used, refused):
            await client.send(post(b"0"))
            assert (await client.response())[0] == 200
        server.admission.drain()
        server.shutdown.set()
        await trio.sleep(0.05)
        await refused.send(post(b"1"))
        status, headers, _ = await refused.response()
        assert (status, headers["connection"]) == (503, "close")
        assert await refused.closed()
        assert await used.closed()
    assert server.bodies == [b"0", b"0"]


async def test_only_bodies_that_miss_the_grace_period_are_refused():
    async with listening(queue=ScriptedQueue(outcome=None), grace_seconds=8) as server:
        length, chunks, heading, waiting = [await server.connect() for _ in range(4)]
        await waiting.send(post(b"a"))
        await length.send(post(b"a", "content-length: 2"))
        await chunks.send(post(chunk(b"a"), "transfer-encoding: chunked"))
        await heading.send(post(b"a")[:30])
        await until(lambda: server.admission.buffered_bytes == 3)
        began = trio.current_time()
        server.admission.drain()
        server.shutdown.set()
        for client, expected in ((length, 503), (chunks, 503), (heading, 408)):
            status, headers, _ = await client.response()
            assert (status, headers["connection"]) == (expected, "close")
        assert trio.current_time() - began >= 6
        assert server.admission.refusals.requests["draining"] == 2
        with trio.move_on_after(0.05):
            await server.admission.settled()
            pytest.fail("one request has no answer yet")
        server.queue.taken[0].reply.set(Done(1))
        assert (await waiting.response())[0] == 200
        with trio.fail_after(60):
            await server.admission.settled()


async def test_the_grace_period_ends():
    async with listening(queue=ScriptedQueue(outcome=None), grace_seconds=0.1) as server:
        client = await server.connect()
        await client.send(post(b"a"))
        await until(lambda: server.queue.taken)
        started = trio.current_time()
        server.shutdown.set()
        assert await client.closed()
        assert trio.current_time() - started >= 0.1


# TLS


async def test_tls_does_not_offer_http2_and_ends_with_a_client_that_stays(tmp_path):
    tls = write_certificate(tmp_path)
    context = ssl.create_default_context(cafile=tls.certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with listening(tls=tls) as server:
        raw = await trio.open_tcp_stream("127.0.0.1", server.port)
        stream = trio.SSLStream(raw, context, server_hostname="127.0.0.1")
        await stream.do_handshake()
        assert stream.selected_alpn_protocol() == "http/1.1"
        await stream.send_all(post(bytes(200_000), "content-length: 200001"))
        await stream.send_all(b"1")
        assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 200 OK\r\n")
        await stream.send_all(b"nonsense\r\n\r\n")
        assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
        with trio.fail_after(60):
            assert await stream.receive_some() == b""
        await trio.aclose_forcefully(stream)
    assert [len(body) for body in server.bodies] == [200_001]


async def test_a_tls_client_that_disconnects_during_its_body_leaves_nothing_behind(tmp_path):
    tls = write_certificate(tmp_path)
    context = ssl.create_default_context(cafile=tls.certificate)
    async with listening(tls=tls) as server:
        raw = await trio.open_tcp_stream("127.0.0.1", server.port)
        stream = trio.SSLStream(raw, context, server_hostname="127.0.0.1")
        await stream.send_all(post(b"a", "content-length: 2"))
        await until(lambda: server.admission.buffered_bytes)
        await stream.unwrap()
        await trio.aclose_forcefully(raw)
        await until(lambda: not server.admission.buffered_bytes)
    assert server.bodies == []
