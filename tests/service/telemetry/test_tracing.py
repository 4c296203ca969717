"""Slow batches become traces, at a limited rate, and never those of the service's own traces."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import trio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from betrace.service.config.edge import Tracing
from betrace.service.telemetry import tracing as tracing_module
from betrace.service.telemetry.tracing import MOST_AT_ONCE, SlowBatches
from tests.support.inprocess import closed, running, send, settings, write_rules
from tests.support.spans import S

NOW = 1_700_000_000_000_000_000
SECOND = 1_000_000_000


@dataclass
class Item:
    tenant: str
    spans: int


@contextmanager
def traced(**given: Any) -> Iterator[tuple[SlowBatches, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    traces = SlowBatches(Tracing(endpoint="http://127.0.0.1:1", **given), exporter, lambda: NOW)
    try:
        yield traces, exporter
    finally:
        traces.close()


async def test_a_slow_batch_becomes_a_trace_of_wait_and_work(autojump_clock):
    with traced() as (traces, exporter):
        stage = traces.stage("rule-evaluation", "traces", lambda item: item.spans)
        stage.waited(9, 1)
        stage.done()  # of the batch before
        stage.waited(0.5, 3)
        stage.waited(0.25, 4)
        stage.slow([Item("a", 3), Item("b", 4), Item("a", 1)], 2.0, None)
        traces.close()
        batch, wait, work = sorted(exporter.get_finished_spans(), key=lambda s: s.name)
    assert batch.name == "batch rule-evaluation"
    assert dict(batch.attributes) == {
        "betrace.stage": "rule-evaluation",
        "betrace.batch.tenants": 2,
        "betrace.batch.items": 3,
        "betrace.batch.traces": 8,
        "betrace.batch.wait_seconds": 0.5,
        "betrace.batch.work_seconds": 2.0,
        "betrace.batches.skipped": 0,
    }
    times = [(span.start_time - NOW, span.end_time - NOW) for span in (batch, wait, work)]
    begin, middle = -int(2.5 * SECOND), -2 * SECOND
    assert times == [(begin, 0), (begin, middle), (middle, 0)]
    assert {wait.parent.span_id, work.parent.span_id} == {batch.context.span_id}
    assert batch.resource.attributes["service.name"] == "betrace"
    assert batch.status.status_code is StatusCode.UNSET


async def test_a_failure_is_in_the_trace(autojump_clock):
    with traced() as (traces, exporter):
        stage = traces.stage("s", "rows", lambda item: 1)
        stage.slow([Item("a", 1)], 2.0, OSError("no disk"))
        traces.close()
        spans = {span.name: span.status for span in exporter.get_finished_spans()}
    assert spans["work"].description == spans["batch s"].description == "OSError: no disk"
    assert spans["wait"].status_code is StatusCode.UNSET


async def test_its_own_traces_are_not_traced(autojump_clock):
    with traced(tenant="me") as (traces, exporter):
        stage = traces.stage("s", "rows", lambda item: 1)
        stage.slow([Item("me", 1), Item("me", 1)], 2.0, None)
        stage.slow([Item("me", 1), Item("a", 1)], 2.0, None)
        traces.close()
        assert len(exporter.get_finished_spans()) == 3


async def test_the_rate_of_traces_is_limited(autojump_clock):
    with traced() as (traces, exporter):
        stage = traces.stage("s", "rows", lambda item: 1)
        for _ in range(500):
            stage.slow([Item("a", 1)], 2.0, None)
        assert traces.skipped == 500 - MOST_AT_ONCE
        await trio.sleep(3)
        for _ in range(500):
            stage.slow([Item("a", 1)], 2.0, None)
        traces.close()
        batches = [s for s in exporter.get_finished_spans() if s.name == "batch s"]
    assert len(batches) == MOST_AT_ONCE + 3
    assert batches[-1].attributes["betrace.batches.skipped"] >= 490


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.got: list[tuple[dict[str, str], ExportTraceServiceRequest]] = []


class Answer(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.got.append((headers, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


async def test_a_service_sends_traces_of_slow_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x")
    monkeypatch.setattr(tracing_module, "_CLOSE_SECONDS", 60)
    write_rules(tmp_path, {"r": "never { a }"})
    with collecting() as collector:
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        tracing = {"endpoint": endpoint, "slow_batch_ms": 100, "tenant": "self"}
        async with running(settings(tmp_path, tracing=tracing)) as service:
            decide = service.pipeline.evaluate._decide

            def slow(batch: Any) -> Any:
                time.sleep(0.15)
                return decide(batch)

            monkeypatch.setattr(service.pipeline.evaluate, "_decide", slow)
            await send(service, [S(1)], "acme")
            await closed(service)
        await trio.to_thread.run_sync(service.close)
        names = [
            span.name
            for _, request in collector.got
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        assert "batch rule-evaluation" in names
        headers, _ = collector.got[0]
        assert headers["x-scope-orgid"] == "self"
        assert headers["authorization"] == "Bearer x"


def alive() -> list[threading.Thread]:
    return threading.enumerate()


async def test_a_hung_endpoint_delays_nothing(tmp_path):
    write_rules(tmp_path, {"r": "never { a }"})
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")  # accepts and never answers
    port = listeners[0].socket.getsockname()[1]
    tracing = {"endpoint": f"http://127.0.0.1:{port}/v1/traces", "slow_batch_ms": 1}
    async with running(settings(tmp_path, tracing=tracing)) as service:
        with trio.fail_after(60):  # for all; without an answer an export takes 5 s
            for number in range(50):
                await send(service, [S(number)])
        await closed(service)
    with trio.fail_after(30):
        await trio.to_thread.run_sync(service.close, abandon_on_cancel=True)
    await listeners[0].aclose()
    with trio.fail_after(60):
        while any("Otel" in thread.name or "shutdown" in thread.name for thread in alive()):
            await trio.sleep(0.05)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://x"])
def test_an_endpoint_is_a_url(endpoint):
    with pytest.raises(ValueError, match="is not a URL"):
        Tracing(endpoint=endpoint)


def test_the_tenant_name_must_be_valid():
    with pytest.raises(ValueError, match=r"tracing\.tenant"):
        Tracing(tenant="a/b")
