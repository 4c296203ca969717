"""The gRPC listener: its address, its stop, and how many connections it keeps."""

from __future__ import annotations

import pytest
import trio

from betrace.service.config.load import ConfigError, load
from betrace.service.receiver.admission import Admission
from betrace.service.receiver.grpc_server import serve_grpc
from betrace.service.receiver.sockets import ListenError
from betrace.service.tenancy.quotas import SpanQuotas
from tests.support.grpc_peer import Peer
from tests.support.http_requests import ScriptedQueue
from tests.support.ingest_servers import listening, until


async def connect(server) -> Peer:
    peer = Peer(await trio.open_tcp_stream("127.0.0.1", server.port))
    await peer.start()
    return peer


async def test_a_port_that_is_taken_is_said_with_the_option():
    async with listening(grpc=True) as server:
        settings = load(None, {"ingest.grpc_address": f"127.0.0.1:{server.port}"}).ingest
        admission = Admission(settings, ScriptedQueue(), SpanQuotas())
        with pytest.raises(ListenError, match="--grpc off"):
            await serve_grpc(admission, settings, trio.Event())


def test_its_address_is_checked_with_the_others():
    with pytest.raises(ConfigError, match=r"ingest\.grpc_address and ingest\.address are both"):
        load(None, {"ingest.grpc_address": "127.0.0.1:4318"})
    with pytest.raises(ConfigError, match=r"ingest\.grpc_address is 0\.0\.0\.0:4317"):
        load(None, {"ingest.grpc_address": "0.0.0.0:4317"})
    for off in ({"ingest.grpc_address": "off"}, {"ingest.address": "off"}):
        load(None, {"api.address": "127.0.0.1:4317"} | off)


async def test_one_that_is_idle_makes_room_for_the_next():
    async with listening(grpc=True, max_connections=2) as server:
        peers = [await connect(server) for _ in range(3)]
        assert (await peers[2].ask(b"spans")).status == 0
        await peers[0].until(lambda: peers[0].closed, seconds=60)
        for peer in peers:
            await peer.stream.aclose()


async def test_a_stop_is_soon_when_nothing_is_under_way():
    async with listening(grpc=True, grace_seconds=30) as server:
        peer = await connect(server)
        await peer.ask(b"spans")
        server.shutdown.set()
        with trio.fail_after(20):  # less than the grace period
            await peer.goaway()
        await peer.stream.aclose()


async def test_a_stop_refuses_what_is_still_arriving():
    async with listening(grpc=True, grace_seconds=1) as server:
        peer = await connect(server)
        stream = await peer.begin()
        await until(lambda: server.admission._bodies.requests)
        server.admission.drain()
        server.shutdown.set()
        answer = await peer.answer(stream)
        assert "shutting down" in answer.message
        await peer.stream.aclose()
