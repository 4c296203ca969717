"""OTLP over gRPC from the exporters that people use: Python's and JavaScript's SDK, and Rotel."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import rotel
import trio
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
    OTLPSpanExporter as HttpExporter,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult

from betrace.service.cli.demo.ports import free_port
from betrace.service.pipeline.request import Refused
from betrace.service.tenancy.authentication import Denied
from tests.e2e.test_python_sdk import pay
from tests.support.http_requests import ScriptedQueue
from tests.support.ingest_servers import listening, write_certificate
from tests.support.process import Running, wait_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
def test_the_python_sdk(service: Running, compression: grpc.Compression | None) -> None:
    exporter = OTLPSpanExporter(service.grpc, insecure=True, compression=compression)
    trace_id, (_, charge) = pay(service, 1000.5, exporter=exporter)
    (signal,) = wait_for(lambda: service.signals(trace_id))
    assert signal["evidence"] == {"payment.charge_card.where(amount > 1000)": [charge]}


def test_a_tenant_is_metadata(service: Running) -> None:
    headers = {"x-scope-orgid": "acme"}
    exporter = OTLPSpanExporter(service.grpc, insecure=True, headers=headers)
    trace_id, _ = pay(service, 1000.5, exporter=exporter)
    assert service.trace(trace_id, "acme")["services"] == ["bank"]


class Tokens:
    """An authenticator that knows one token."""

    def remembered(self, authorization: str) -> str | None:
        return "acme" if authorization == "Bearer good" else None

    async def tenant(self, authorization: str | None) -> Denied:
        return Denied(401, "unauthenticated; send a token")


def export_one(exporter: OTLPSpanExporter) -> SpanExportResult:
    provider = TracerProvider(shutdown_on_exit=False)
    results = []
    send = exporter.export
    exporter.export = lambda spans: results.append(send(spans)) or results[-1]
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("t").start_span("s").end()
    provider.shutdown()
    return results[0]


async def test_python_with_tls_and_a_token(tmp_path: Path) -> None:
    tls = write_certificate(tmp_path)
    trusted = grpc.ssl_channel_credentials((tmp_path / "c.pem").read_bytes())

    def send(url: str) -> list[SpanExportResult]:
        return [
            export_one(OTLPSpanExporter(url, credentials=trusted, headers={"authorization": token}))
            for token in ("Bearer good", "Bearer bad")
        ]

    async with listening(grpc=True, tls=tls, authenticator=Tokens()) as server:
        good, bad = await trio.to_thread.run_sync(send, server.url)
    assert (good, bad) == (SpanExportResult.SUCCESS, SpanExportResult.FAILURE)
    assert [request.tenant for request in server.queue.taken] == ["acme"]
    assert server.admission.refusals.requests["unauthenticated"] == 1  # it was not tried again


async def test_javascript_with_tls_and_a_token(tmp_path: Path, folder: Path) -> None:
    tls = write_certificate(tmp_path)

    def send(url: str) -> list[int]:
        given = {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "c.pem")}
        return [
            subprocess.run(
                ["node", "send.mjs", url, "grpc", "gzip"],
                cwd=folder,
                env=os.environ
                | given
                | {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{token}"},
                capture_output=True,
                timeout=60,
            ).returncode
            for token in ("good", "bad")
        ]

    async with listening(grpc=True, tls=tls, authenticator=Tokens()) as server:
        good, bad = await trio.to_thread.run_sync(send, server.url)
    assert (good, bad) == (0, 1)
    assert {(r.tenant, r.encoding) for r in server.queue.taken} == {("acme", "gzip")}


async def test_python_comes_again_when_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ScriptedQueue(outcome=Refused(503, "wait"))

    def send(url: str) -> SpanExportResult:
        return export_one(OTLPSpanExporter(url, insecure=True))

    async with listening(queue, grpc=True) as server, trio.open_nursery() as nursery:
        results = []

        async def run() -> None:
            results.append(await trio.to_thread.run_sync(send, server.url))

        nursery.start_soon(run)
        while not queue.taken:
            await trio.sleep(0.01)
        queue.outcome = ScriptedQueue().outcome
        with trio.fail_after(60):
            while not results:
                await trio.sleep(0.01)
    assert results == [SpanExportResult.SUCCESS]
    assert len(queue.taken) == 2


@contextmanager
def forwarding(*options: str) -> Iterator[str]:
    """Rotel, which forwards; the URL where it takes OTLP over HTTP."""
    agent = Path(rotel.__file__).parent / "rotel-agent"
    port = free_port()
    command = [str(agent), "start", "--otlp-http-endpoint", f"127.0.0.1:{port}"]
    command += ["--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}", "--exporter", "otlp"]
    log = subprocess.PIPE
    process = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT)
    try:

        def up() -> bool:
            assert process.poll() is None, process.stdout and process.stdout.read()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(up)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_rotel(service: Running, protocol: str, compression: str) -> None:
    url = service.grpc if protocol == "grpc" else service.ingest
    options = ["--otlp-exporter-endpoint", url, "--otlp-exporter-protocol", protocol]
    options += ["--otlp-exporter-compression", compression]
    with forwarding(*options) as rotel_url:
        exporter = HttpExporter(f"{rotel_url}/v1/traces")
        trace_id, _ = pay(service, 1000.5, exporter=exporter)
    (signal,) = wait_for(lambda: service.signals(trace_id))
    assert signal["rule_id"] == "fraud-check"


def test_logs_over_grpc_end_at_once(service: Running) -> None:
    """No retries: an SDK that sends everything is told how to stop."""
    with grpc.insecure_channel(service.grpc.removeprefix("http://")) as channel:
        call = channel.unary_unary("/opentelemetry.proto.collector.logs.v1.LogsService/Export")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    wait_for(lambda: any("OTEL_LOGS_EXPORTER=none" in line for line in service.log))
    samples = service.samples(service.metrics)
    assert samples['betrace_requests_refused_total{reason="logs"}'] >= 1
    assert samples['betrace_spans_refused_total{reason="logs"}'] == 0
