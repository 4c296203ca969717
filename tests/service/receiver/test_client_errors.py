"""One line of the log for each kind of error and peer in a minute."""

from __future__ import annotations

import httpx
import trio

from betrace.service.receiver.client_errors import ClientErrors
from betrace.service.receiver.grpc.framing import GrpcCode
from tests.support.grpc_peer import Peer
from tests.support.ingest_servers import listening

PROTOBUF = {"content-type": "application/x-protobuf"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_kind_and_peer_has_a_line_a_minute(caplog):
    clock = Clock()
    errors = ClientErrors(clock)
    for _ in range(3):
        errors.note("type", "192.0.2.1", "send protobuf")
        errors.note("type", "192.0.2.2", "send protobuf")
    errors.note("logs", "192.0.2.1", "turn logs off")
    assert len(caplog.records) == 3
    clock.now = 61
    errors.note("type", "192.0.2.1", "send protobuf")
    assert len(caplog.records) == 4
    assert "(2 more since the last line)" in caplog.records[-1].getMessage()


def test_what_a_client_sends_does_not_break_lines(caplog):
    ClientErrors(Clock()).note("method", "192.0.2.1", "there is no method /x\nERROR forged\x1b[2J")
    (record,) = caplog.records
    assert record.getMessage().isprintable()


def test_many_peers_take_bounded_memory_and_lines(caplog):
    clock = Clock()
    errors = ClientErrors(clock)
    for peer in range(5000):
        errors.note("type", str(peer), "send protobuf")
    assert len(errors) == 1000
    assert len(caplog.records) == 60
    clock.now = 60
    errors.note("type", "new", "send protobuf")
    assert len(caplog.records) == 61


async def test_errors_over_http_leave_a_line(caplog):
    async with listening() as server, httpx.AsyncClient(base_url=server.url) as client:
        for _ in range(2):
            await client.post("/", headers=PROTOBUF, content=b"x")
            await client.post("/v1/logs", headers=PROTOBUF, content=b"x")
            await client.get("/v1/traces")
            await client.post("/v1/traces", headers={"content-type": "text/plain"}, content=b"x")
            await client.post("/v1/traces", headers=PROTOBUF, content=b"x")
        raw = await server.connect()
        await raw.send(b"GET / HTTP/3.0\r\n\r\n")
        await raw.response()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 5
    assert all(line.startswith("rejected a request from 127.0.0.1: ") for line in lines)
    for said in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_LOGS_EXPORTER=none", "use POST"):
        assert sum(said in line for line in lines) == 1


async def test_grpc_at_the_port_of_http_is_told_the_other_port(caplog):
    async with listening() as server:
        peer = Peer(await trio.open_tcp_stream("127.0.0.1", server.port))
        await peer.start()
        for _ in range(2):
            answer = await peer.ask(b"spans")
            assert answer.status == GrpcCode.UNIMPLEMENTED
            assert "ingest.grpc_address (4317)" in answer.message
        await peer.stream.aclose()
    assert len(caplog.records) == 1
    assert not server.bodies
    assert server.admission.refusals.requests["malformed"] == 1
