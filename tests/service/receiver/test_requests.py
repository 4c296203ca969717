"""What the ingestion listener does with requests over a real socket."""

from __future__ import annotations

import gc
import gzip
import ssl

import httpx
import pytest
import trio
from google.rpc.status_pb2 import Status

from betrace.service.config.edge import Tls
from betrace.service.pipeline.request import Done, Refused
from betrace.service.receiver.http1 import ChunkedBody
from betrace.service.receiver.sockets import ListenError
from tests.support.http_requests import ScriptedQueue
from tests.support.ingest_servers import MIB, chunk, listening, post, until, write_certificate

PROTOBUF = {"content-type": "application/x-protobuf"}


async def test_a_request_and_its_answer():
    async with listening() as server, httpx.AsyncClient() as client:
        url = server.url + "/v1/traces"
        answer = await client.post(url, content=b"abc", headers=PROTOBUF)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == "application/x-protobuf"
        assert "server" not in answer.headers
        body = gzip.compress(b"x" * 300_000)
        gzipped = {**PROTOBUF, "content-encoding": "gzip", "x-scope-orgid": "acme"}
        assert (await client.post(url, content=body, headers=gzipped)).status_code == 200
        answer = await client.post(url, json={})
        assert answer.json() == {}
    assert server.bodies == [b"abc", body, b"{}"]
    request = server.queue.taken[1]
    assert (request.encoding, request.tenant) == ("gzip", "acme")


async def test_rejected_spans_reach_the_client():
    queue = ScriptedQueue(outcome=Done(1, 2, "two were bad"))
    async with listening(queue) as server, httpx.AsyncClient() as client:
        answer = await client.post(server.url + "/v1/traces", json={})
        assert answer.json()["partialSuccess"]["rejectedSpans"] == "2"
        queue.outcome = Refused(400, "not protobuf")
        answer = await client.post(server.url + "/v1/traces", content=b"?", headers=PROTOBUF)
        assert answer.status_code == 400
        assert Status.FromString(answer.content).message == "not protobuf"


@pytest.mark.parametrize("size", [1, 1000, 65_536, 70_000, 3 * MIB])
async def test_bodies_of_all_sizes_in_all_pieces(size):
    body = bytes(i * i % 251 for i in range(min(size, 70_000))) * max(1, size // 70_000)
    async with listening() as server:
        client = await server.connect()
        for piece in (len(body), 50_000, 1 + len(body) // 3):
            request = post(body)
            for start in range(0, len(request), piece):
                await client.send(request[start : start + piece])
                await trio.sleep(0.002)
            assert (await client.response())[0] == 200
    assert server.bodies == [body] * 3


async def test_a_body_of_20_mib_is_accepted_and_one_byte_more_is_refused():
    async with listening() as server, httpx.AsyncClient(timeout=60) as client:
        url = server.url + "/v1/traces"
        answer = await client.post(url, content=bytes(20 * MIB), headers=PROTOBUF)
        assert answer.status_code == 200
        answer = await client.post(url, content=bytes(20 * MIB + 1), headers=PROTOBUF)
        assert answer.status_code == 413
        assert "20971520" in Status.FromString(answer.content).message
        assert (await client.post(url, content=b"a", headers=PROTOBUF)).status_code == 200
    assert [len(body) for body in server.bodies] == [20 * MIB, 1]


async def test_a_chunked_body_over_the_limit_is_refused_while_it_arrives():
    async with listening(max_body_bytes=100_000) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + chunk(bytes(60_000)) * 2)
        status, _, body = await client.response()  # the body is not complete yet
        assert status == 413
        assert "100000 bytes" in Status.FromString(body).message
        await client.send(chunk(b"x") + b"0\r\n\r\n")
        await client.send(post(b"next"))  # the rest was read, so the connection stays open
        assert (await client.response())[0] == 200
    assert server.bodies == [b"next"]


async def test_a_chunked_body_that_never_ends_is_cut_off():
    async with listening(max_body_bytes=100_000) as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked"))
        megabyte = chunk(bytes(MIB))
        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
            await client.send(megabyte * 100)
    assert server.bodies == []
    assert server.admission.refusals.requests["too_large"] == 1


async def test_a_chunked_body_within_the_limit():
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"", "transfer-encoding: chunked") + chunk(b"ab"))
        await trio.sleep(0.01)
        await client.send(chunk(b"cd") + b"0\r\n\r\n")
        assert (await client.response())[0] == 200
    assert server.bodies == [b"abcd"]


async def test_a_chunked_body_is_released_once_answered_without_a_garbage_collection():
    async with listening() as server:
        kept = [await server.connect() for _ in range(5)]
        gc.collect()
        gc.disable()
        try:
            for client in kept:
                await client.send(post(b"", "transfer-encoding: chunked") + chunk(bytes(MIB)))
                await trio.sleep(0.01)
                await client.send(b"0\r\n\r\n")
                assert (await client.response())[0] == 200
            server.queue.taken.clear()
            await until(lambda: server.admission.buffered_bytes == 0)
            assert not any(isinstance(each, ChunkedBody) for each in gc.get_objects())
            broken_off = await server.connect()
            await broken_off.send(post(b"", "transfer-encoding: chunked") + chunk(bytes(MIB)))
            await until(lambda: server.admission.buffered_bytes == MIB)
            await broken_off.stream.aclose()
            await until(lambda: server.admission.buffered_bytes == 0)
            await until(lambda: not any(isinstance(o, ChunkedBody) for o in gc.get_objects()))
        finally:
            gc.enable()


async def test_too_many_bodies_at_once_are_refused():
    async with listening(max_body_bytes=4 * MIB, max_buffered_bytes=4 * MIB) as server:
        first, second, third = [await server.connect() for _ in range(3)]
        await first.send(post(bytes(2 * MIB), f"content-length: {3 * MIB}"))
        await until(lambda: server.admission.buffered_bytes >= MIB)
        await second.send(post(bytes(3 * MIB)))
        status, headers, _ = await second.response()
        assert (status, headers["retry-after"]) == (503, "1")
        await second.send(post(b"small"))  # the rest of the other body was dropped
        assert (await second.response())[0] == 200
        await third.send(post(bytes(MIB), "x-scope-orgid: quiet"))
        assert (await third.response())[0] == 200
    assert server.admission.refusals.requests["memory"] == 1


async def test_slow_senders_take_memory_for_what_they_sent_not_what_they_announced():
    async with listening() as server:
        slow = [await server.connect() for _ in range(30)]
        for client in slow:
            await client.send(post(b"abc", f"content-length: {19 * MIB}"))  # 570 MiB in all
        await until(lambda: server.admission.buffered_bytes == 90)
        honest = await server.connect()
        await honest.send(post(bytes(5 * MIB)))
        assert (await honest.response())[0] == 200


async def test_a_slow_body_gets_a_503():
    async with listening(body_timeout_seconds=0.2) as server:
        client = await server.connect()
        await client.send(post(b"abc", "content-length: 10"))
        status, headers, body = await client.response()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert "in time" in Status.FromString(body).message
        assert await client.closed()
    assert server.admission.refusals.requests["slow_body"] == 1


@pytest.mark.parametrize("framing", ["content-length: 10", "transfer-encoding: chunked"])
async def test_a_client_that_disconnects_during_its_body_leaves_nothing_behind(framing):
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"3\r\nabc\r\n", framing))
        await until(lambda: server.admission.buffered_bytes)
        await client.stream.aclose()
        await until(lambda: not server.admission.buffered_bytes)
    assert server.bodies == []


async def test_a_request_is_accepted_even_if_its_client_disconnects_while_queued():
    async with listening(ScriptedQueue(outcome=None)) as server:
        client = await server.connect()
        await client.send(post(b"abc"))
        await until(lambda: server.queue.taken)
        await client.stream.aclose()
        await trio.sleep(0.05)
        server.queue.taken[0].reply.set(Done(1))
        await until(lambda: server.admission.accepted_requests)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
async def test_other_methods(method):
    async with listening() as server, httpx.AsyncClient() as client:
        for _ in range(2):  # the second on the same connection
            answer = await client.request(method, server.url + "/v1/traces")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert bool(answer.content) is (method != "HEAD")
            assert int(answer.headers["content-length"]) > 0


async def test_pipelined_requests_are_answered_in_order():
    async with listening() as server:
        client = await server.connect()
        get = b"GET /v1/traces HTTP/1.1\r\nhost: x\r\n\r\n"
        chunked = post(b"", "transfer-encoding: chunked") + chunk(b"two") + b"0\r\n\r\n"
        missing = post(b"two", path="/nothing")
        await client.send(post(b"one") + get + chunked + missing + chunked + post(b"three"))
        assert [(await client.response())[0] for _ in range(6)] == [200, 405, 200, 404, 200, 200]
    assert server.bodies == [b"one", b"two", b"two", b"three"]


async def test_a_refusal_before_the_body_keeps_the_connection():
    async with listening(ScriptedQueue(fill=1.0)) as server:
        client = await server.connect()
        await client.send(post(b"x" * 300_000))
        status, headers, _ = await client.response()
        assert (status, headers["retry-after"]) == (503, "1")
        server.queue.fill = 0.5
        await client.send(post(b"again"))
        assert (await client.response())[0] == 200
    assert server.bodies == [b"again"]


async def test_queries_in_the_target_are_ignored_and_both_paths_work():
    async with listening() as server:
        client = await server.connect()
        for path in ("/v1/traces?a=b", "/api/otlp/traces"):
            await client.send(post(b"a", path=path))
            assert (await client.response())[0] == 200


async def test_expect_100_continue():
    async with listening() as server:
        client = await server.connect()
        await client.send(post(b"", "expect: 100-continue", "content-length: 3"))
        assert (await client.response())[0] == 100
        await client.send(b"abc")
        assert (await client.response())[0] == 200
    assert server.bodies == [b"abc"]


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\nhost : x\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 70_000,
    ],
)
async def test_invalid_http_gets_an_answer_and_the_connection_ends(raw):
    async with listening() as server:
        client = await server.connect()
        await client.send(raw)
        assert (await client.response())[0] in (400, 431)
        assert await client.closed()
    assert server.bodies == []


async def test_an_idle_connection_is_closed():
    async with listening(keep_alive_seconds=0.2) as server:
        client = await server.connect()
        await client.send(post(b"abc"))
        assert (await client.response())[0] == 200
        assert await client.closed()


async def test_a_request_in_progress_is_answered_at_shutdown():
    async with listening(ScriptedQueue(outcome=None)) as server:
        client = await server.connect()
        idle = await server.connect()
        await client.send(post(b"abc"))
        await until(lambda: server.queue.taken)
        server.shutdown.set()
        await trio.sleep(0.05)
        server.queue.taken[0].reply.set(Done(1))
        assert (await client.response())[0] == 200
        assert await client.closed()
        assert await idle.closed()
        with pytest.raises(OSError, match="connect"):
            await server.connect()


async def test_an_address_in_use_is_a_readable_error():
    async with listening() as server:
        with pytest.RaisesGroup(
            pytest.RaisesExc(ListenError, match=r"in use\); end the program that uses it"),
            flatten_subgroups=True,
        ):
            async with listening(address=f"127.0.0.1:{server.port}"):
                pass


async def test_an_address_of_another_machine_is_a_readable_error():
    with pytest.RaisesGroup(
        pytest.RaisesExc(ListenError, match="choose an address of this machine"),
        flatten_subgroups=True,
    ):
        async with listening(address="192.0.2.1:0"):
            pass


async def test_a_missing_certificate_is_a_readable_error(tmp_path):
    tls = Tls(certificate=str(tmp_path / "c.pem"), key=str(tmp_path / "k.pem"))
    with pytest.RaisesGroup(
        pytest.RaisesExc(ListenError, match=r"cannot be used.*check tls.certificate and tls.key"),
        flatten_subgroups=True,
    ):
        async with listening(tls=tls):
            pass


async def test_tls(tmp_path):
    tls = write_certificate(tmp_path)
    async with listening(tls=tls) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=tls.certificate)
        big = bytes(range(256)) * 4000
        async with httpx.AsyncClient(verify=context) as client:
            url = server.url + "/v1/traces"
            assert (await client.post(url, content=b"a", headers=PROTOBUF)).status_code == 200
            assert (await client.post(url, content=big, headers=PROTOBUF)).status_code == 200
            server.queue.fill = 1.0
            assert (await client.post(url, content=big, headers=PROTOBUF)).status_code == 503
        plain = await server.connect()
        await plain.send(post(b"x"))
        assert await plain.closed()
    assert server.bodies == [b"a", big]
