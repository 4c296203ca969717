"""An edge on a real NATS server: what clients send reaches the partitions' logs once."""

from __future__ import annotations

import base64
import gzip
import json

import pytest
import trio
from google.protobuf.json_format import MessageToDict
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
    OTLPSpanExporter as GrpcExporter,
)
from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
    OTLPSpanExporter as HttpExporter,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, generate_latest

from betrace.service.cluster.edge import group_commit
from betrace.service.storage.jetstream import setup
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout
from tests.support.edges import edge_settings, post, post_until_accepted, running_edge, stored_spans
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers
from tests.support.spans import S, body


def spans(first: int, count: int) -> bytes:
    return body(*(S(n, trace=n.to_bytes(16, "big")) for n in range(first, first + count)))


def as_json(payload: bytes) -> bytes:
    found = MessageToDict(
        ExportTraceServiceRequest.FromString(payload), use_integers_for_enums=True
    )
    for resource in found["resourceSpans"]:
        for span in resource["scopeSpans"][0]["spans"]:
            for field, size in (("traceId", 16), ("spanId", 8), ("parentSpanId", 8)):
                span[field] = int_of(span[field]).to_bytes(size, "big").hex()
    return json.dumps(found).encode()


def int_of(text: str) -> int:
    return int.from_bytes(base64.b64decode(text), "big")


async def test_bodies_of_all_kinds_reach_the_log_once(cluster, client, http, tmp_path):
    async with running_edge(edge_settings(cluster, tmp_path)) as (edge, url, _):
        answers = [
            await post(http, url, spans(1, 10)),
            await post(http, url, gzip.compress(spans(11, 10)), **{"content-encoding": "gzip"}),
            await post(http, url, as_json(spans(21, 10)), **{"content-type": "application/json"}),
            await post(http, url, spans(1, 10), "acme"),
        ]
        assert [each.status_code for each in answers] == [200] * 4
        wrong = await post(http, url, b"\x07\x07")
        assert wrong.status_code == 400
        partial = await post(http, url, body(S(41), S(42, trace=bytes(16))))
        assert partial.status_code == 200
        assert b"trace id" in partial.content
        assert edge.component()["status"] == "ok"
        registry = CollectorRegistry()
        registry.register(type("Edge", (), {"collect": lambda _: edge.metrics()})())
        shown = generate_latest(registry).decode()
        assert "betrace_span_ingestion_total 41.0" in shown
        assert "betrace_edge_log_spans_total 41.0" in shown
        assert 'betrace_requests_refused_total{reason="undecodable"} 1.0' in shown
    expected = {("default", n): 1 for n in (*range(1, 31), 41)}
    expected |= {("acme", n): 1 for n in range(1, 11)}
    assert await stored_spans(client, cluster) == expected


async def test_accepted_requests_are_recorded(cluster, client, http, tmp_path):
    settings = edge_settings(cluster, tmp_path, audit={"batches": True})
    async with running_edge(settings) as (_, url, _):
        assert (await post(http, url, spans(1, 10), "acme")).status_code == 200
        assert (await post(http, url, b"\x07")).status_code == 400
    (line,) = (tmp_path / "batches.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["tenant"], record["spans"], record["offset"]) == ("acme", 10, None)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_an_opentelemetry_client_sends_through_an_edge(cluster, client, tmp_path, protocol):
    async with running_edge(edge_settings(cluster, tmp_path)) as (_, url, grpc):

        def send() -> set[int]:
            if protocol == "http":
                exporter = HttpExporter(url)
            else:
                exporter = GrpcExporter(grpc, insecure=True)
            provider = TracerProvider(shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(exporter))
            tracer = provider.get_tracer("test")
            sent = set()
            for _ in range(20):
                with tracer.start_as_current_span("outer") as outer:
                    sent.add(outer.get_span_context().span_id)
                    with tracer.start_as_current_span("inner") as inner:
                        sent.add(inner.get_span_context().span_id)
            assert provider.force_flush(60_000)
            provider.shutdown()
            return sent

        sent = await trio.to_thread.run_sync(send)
    stored = await stored_spans(client, cluster)
    assert {span & (2**64 - 1) for _, span in stored} == sent
    assert set(stored.values()) == {1}


async def test_an_edge_that_stops_answers_what_it_has_received(cluster, client, http, tmp_path):
    answered = []
    async with (
        trio.open_nursery() as nursery,
        running_edge(edge_settings(cluster, tmp_path)) as (edge, url, _),
    ):

        async def send(number: int) -> None:
            answered.append((await post(http, url, spans(10 * number + 1, 10))).status_code)

        for number in range(20):
            nursery.start_soon(send, number)
        with trio.fail_after(60):
            while edge.admission.accepted_requests < 5:
                await trio.sleep(0)
    assert set(answered) <= {200, 503}
    stored = await stored_spans(client, cluster)
    assert sum(stored.values()) == 10 * answered.count(200)


async def test_an_edge_that_stops_takes_spans_until_the_delay_is_over(
    cluster, client, http, tmp_path
):
    shutdown = {"delay_seconds": 0.5, "grace_seconds": 30}
    settings = edge_settings(cluster, tmp_path / "edge", shutdown=shutdown)
    async with running_edge(settings) as (edge, _, _):
        began = trio.current_time()
        edge.stop()
        with trio.fail_after(60):
            while edge.admission.state == "open":
                await trio.sleep(0.01)
        assert trio.current_time() - began >= 0.5


async def test_a_full_stream_refuses_until_there_is_room(
    one_server, client, cluster, http, tmp_path
):
    layout = Layout.of(cluster)

    async def limit(most: int) -> None:
        for partition in range(cluster.partitions):
            wanted = next(
                each for each in layout.streams() if each["name"] == layout.spans_stream(partition)
            )
            await client.call(
                lambda nats, w=wanted: nats.api(
                    f"STREAM.UPDATE.{w['name']}", {**w, "max_bytes": most}
                )
            )

    async with running_edge(edge_settings(cluster, tmp_path)) as (edge, url, _):
        assert (await post(http, url, spans(1, 10))).status_code == 200
        await limit(1000)
        with trio.fail_after(60):
            for number in range(100):
                refused = await post(http, url, spans(1000 * number + 11, 100))
                if refused.status_code != 200:
                    break
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert b"is full" in refused.content
        assert edge.commit.counts.full >= 1
        await limit(-1)
        payload = spans(1000 * number + 11, 100)
        attempts = await post_until_accepted(http, [url], payload)
    stored = await stored_spans(client, cluster)
    assert all(
        stored["default", n] <= attempts + 1 for n in range(1000 * number + 11, 1000 * number + 111)
    )
    assert all(stored["default", 1000 * number + n] >= 1 for n in range(11, 111))
    assert all(stored["default", n] == 1 for n in range(1, 11))


async def test_without_a_server_requests_get_503_and_later_200(http, tmp_path, monkeypatch):
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path / "nats") as servers:
        cluster = servers.settings()
        client = await NatsClient.connect(cluster, "test")
        await setup.set_up(client, cluster)
        async with running_edge(edge_settings(cluster, tmp_path / "edge")) as (edge, url, _):
            assert (await post(http, url, spans(1, 10))).status_code == 200
            servers.servers[0].kill()
            with monkeypatch.context() as patched:
                patched.setattr(group_commit, "APPEND_SECONDS", 0.5)
                refused = await post(http, url, spans(11, 10))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert b"they count once" in refused.content
            assert edge.commit.counts.no_quorum >= 1
            servers.start()
            await post_until_accepted(http, [url], spans(11, 10))
        stored = await stored_spans(client, cluster)
        assert set(stored) == {("default", n) for n in range(1, 21)}
        await client.close()
