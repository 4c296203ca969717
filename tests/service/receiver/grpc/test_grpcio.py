"""gRPC's own client, on grpc-core, against the listener."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from contextlib import contextmanager

import grpc
import pytest
import trio

from betrace.service.pipeline.request import Done
from betrace.service.receiver.grpc.methods import CHECK, EXPORT, WATCH
from betrace.service.tenancy.authentication import Denied
from tests.support.http_requests import ScriptedQueue
from tests.support.ingest_servers import MIB, listening, until, write_certificate

pytestmark = pytest.mark.slow


@contextmanager
def channel(port, *options, credentials=None):
    target = f"127.0.0.1:{port}"
    options = [("grpc.enable_http_proxy", 0), *options]
    if credentials is None:
        opened = grpc.insecure_channel(target, options)
    else:
        opened = grpc.secure_channel(target, credentials, options)
    with opened:
        yield opened


def export(opened, message=b"spans", timeout=60, **more):
    return opened.unary_unary(EXPORT)(message, timeout=timeout, **more)


def code(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


async def in_thread(function, *arguments):
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(function, *arguments)


async def test_large_messages_with_and_without_gzip():
    body = bytes(range(256)) * (20 * MIB // 256)

    def send(port):
        with channel(port) as opened:
            export(opened, body)
            export(opened, body[: 3 * MIB], compression=grpc.Compression.Gzip)
            return code(lambda: export(opened, body + b"x"))

    async with listening(grpc=True) as server:
        status, message = await in_thread(send, server.port)
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert "20971520" in message
    assert server.bodies[0] == body
    assert [r.encoding for r in server.queue.taken] == ["", "gzip"]
    assert len(server.bodies[1]) < MIB


async def test_many_streams_of_many_threads():
    def send(port):
        with channel(port) as opened:
            call = opened.unary_unary(EXPORT)
            waiting = [call.future(b"%06d" % i * (i % 700), timeout=30) for i in range(500)]
            return [future.result() for future in waiting]

    async with listening(grpc=True) as server:
        assert await in_thread(send, server.port) == [b""] * 500
    assert sorted(server.bodies) == sorted(b"%06d" % i * (i % 700) for i in range(500))


async def test_deadlines_and_cancellation():
    queue = ScriptedQueue(outcome=None)

    def send(port):
        with channel(port) as opened:
            grpc.channel_ready_future(opened).result(60)
            late = code(lambda: export(opened, timeout=2))
            future = opened.unary_unary(EXPORT).future(b"cancelled", timeout=60)
            while len(queue.taken) < 2:
                time.sleep(0.01)
            future.cancel()
            queue.outcome = Done(1)
            export(opened, b"next")
            return late, future.code()

    async with listening(queue, grpc=True) as server:
        late, cancelled = await in_thread(send, server.port)
        assert late[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        assert cancelled == grpc.StatusCode.CANCELLED
        assert server.bodies == [b"spans", b"cancelled", b"next"]
        for request in queue.taken[:2]:
            request.reply.set(Done(1))


async def test_keep_alive_pings():
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_timeout_ms", 4000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    queue = ScriptedQueue(outcome=None)

    def send(port):
        with channel(port, *options) as opened:
            future = opened.unary_unary(EXPORT).future(b"spans", timeout=60)
            time.sleep(6.5)
            trio.from_thread.run_sync(queue.taken[0].reply.set, Done(1))
            return future.result()

    async with listening(queue, grpc=True) as server:
        with trio.fail_after(60):
            assert await in_thread(send, server.port) == b""


async def test_a_client_connects_again_after_a_stop():
    connected = threading.Event()
    again = threading.Event()

    def send(port):
        with channel(port, ("grpc.initial_reconnect_backoff_ms", 100)) as opened:
            export(opened, b"first")
            connected.set()
            again.wait(60)
            export(opened, b"second", wait_for_ready=True)

    async with trio.open_nursery() as nursery:
        async with listening(grpc=True) as server:
            nursery.start_soon(in_thread, send, server.port)
            await until(connected.is_set)
        async with listening(grpc=True, address=f"127.0.0.1:{server.port}") as other:
            again.set()
            await until(lambda: other.bodies)
    assert (server.bodies, other.bodies) == ([b"first"], [b"second"])


async def test_health():
    def ask(port):
        with channel(port) as opened:
            assert opened.unary_unary(CHECK)(b"", timeout=60) == b"\x08\x01"
            watch = opened.unary_stream(WATCH)(b"", timeout=60)
            assert next(watch) == b"\x08\x01"
            server.admission.pause()
            assert next(watch) == b"\x08\x02"
            server.admission.resume()
            assert next(watch) == b"\x08\x01"
            watch.cancel()

    async with listening(grpc=True) as server:
        await in_thread(ask, server.port)


class Tokens:
    """An authenticator that knows one token."""

    def remembered(self, authorization):
        return "acme" if authorization == "Bearer good" else None

    async def tenant(self, authorization):
        await trio.sleep(0.01)
        return Denied(401, "unauthenticated; send a token")


async def test_tls_and_tokens(tmp_path):
    tls = write_certificate(tmp_path)
    trusted = grpc.ssl_channel_credentials((tmp_path / "c.pem").read_bytes())

    def send(port):
        with channel(port, credentials=trusted) as opened:
            export(opened, metadata=[("authorization", "Bearer good")])
            bad = code(lambda: export(opened, metadata=[("authorization", "Bearer bad")]))
        with channel(port, ("grpc.initial_reconnect_backoff_ms", 100)) as opened:
            plain = code(lambda: export(opened, timeout=2))
        return bad, plain

    async with listening(grpc=True, tls=tls, authenticator=Tokens()) as server:
        bad, plain = await in_thread(send, server.port)
    assert bad == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated; send a token")
    assert plain[0] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert [request.tenant for request in server.queue.taken] == ["acme"]


async def test_overload_is_retried_by_the_client():
    """A service config as gRPC's own retries use it: UNAVAILABLE is tried again."""
    queue = ScriptedQueue(fill=1.0)
    config = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": '
        '"0.2s", "maxBackoff": "1s", "backoffMultiplier": 2, '
        '"retryableStatusCodes": ["UNAVAILABLE"]}}]}'
    )

    def send(port):
        with channel(port, ("grpc.service_config", config)) as opened:
            return export(opened)

    async with listening(queue, grpc=True) as server, trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, send, server.port)
        await until(lambda: server.admission.refusals.requests["overloaded"])
        queue.fill = 0.0
        await until(lambda: server.bodies)


async def test_concurrent_channels():
    def send(port):
        def one(number):
            with channel(port, ("grpc.use_local_subchannel_pool", 1)) as opened:
                for i in range(20):
                    export(opened, b"%d-%d" % (number, i))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(8)))

    async with listening(grpc=True) as server:
        await in_thread(send, server.port)
    assert len(set(server.bodies)) == 160
