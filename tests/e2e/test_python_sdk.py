"""Traces sent by the Python SDK, from its exporter to the API."""

from __future__ import annotations

import pytest
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from tests.support.process import Running, wait_for

pytestmark = pytest.mark.slow


def pay(
    service: Running,
    amount: float,
    *,
    check: bool = False,
    compression: Compression = Compression.NoCompression,
    tenant: str | None = None,
    exporter: SpanExporter | None = None,
) -> tuple[str, list[str]]:
    """Send a payment. Return its trace id and its span ids, the root first."""
    provider = TracerProvider(resource=Resource({"service.name": "bank"}), shutdown_on_exit=False)
    exporter = exporter or OTLPSpanExporter(
        f"{service.ingest}/v1/traces",
        compression=compression,
        headers={"x-scope-orgid": tenant} if tenant else None,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("bank")
    with tracer.start_as_current_span("POST /pay") as root:
        with tracer.start_as_current_span("payment.charge_card") as charge:
            charge.set_attributes({"amount": amount, "currency": "EUR", "tags": ["a", "b"]})
            charge.add_event("charged", {"note": "Grüße"})
        if check:
            tracer.start_span("payment.fraud_check").end()
    provider.shutdown()
    spans = [root, charge]
    return (
        format_trace_id(root.get_span_context().trace_id),
        [format_span_id(span.get_span_context().span_id) for span in spans],
    )


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
def test_a_breach_becomes_a_signal(service: Running, compression: Compression) -> None:
    trace_id, (_, charge) = pay(service, 1000.5, compression=compression)
    (signal,) = wait_for(lambda: service.signals(trace_id))
    check = "payment.charge_card.where(amount > 1000)"
    assert signal["rule_id"] == "fraud-check"
    assert signal["severity"] == "critical"
    assert signal["clause"] == "always"
    assert signal["kind"] == "raised"
    assert signal["status"] == "active"
    assert signal["tenant"] == "default"
    assert signal["labels"] == {"team": "payments"}
    assert signal["counts"] == {check: 1, "payment.fraud_check": 0}
    assert signal["evidence"] == {check: [charge]}
    assert service.get(f"/api/v1/signals/{signal['id']}").json() == signal


def test_a_trace_without_breaches_has_no_signal(service: Running) -> None:
    trace_id, _ = pay(service, 5000, check=True)
    trace = service.trace(trace_id)
    assert trace["signals"] == service.signals(trace_id) == []
    assert {rule: says["verdict"] for rule, says in trace["verdicts"].items()} == {
        "fraud-check": "kept",
        "too-many-spans": "kept",
    }


def test_a_trace_is_returned_as_it_was_sent(service: Running) -> None:
    trace_id, (root, charge) = pay(service, 1500, compression=Compression.Gzip)
    (signal,) = wait_for(lambda: service.signals(trace_id))
    trace = service.trace(trace_id)
    assert trace["signals"] == [signal]
    assert trace["verdicts"]["fraud-check"]["verdict"] == "breach"
    assert trace["missing"] == 0
    spans = {
        span["spanId"]: span
        for resource in trace["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    }
    assert spans.keys() == {root, charge}
    assert spans[root]["name"] == "POST /pay"
    assert spans[charge]["parentSpanId"] == root
    attributes = {a["key"]: a["value"] for a in spans[charge]["attributes"]}
    assert attributes["amount"] == {"intValue": "1500"}
    assert attributes["tags"]["arrayValue"]["values"] == [
        {"stringValue": "a"},
        {"stringValue": "b"},
    ]
    (event,) = spans[charge]["events"]
    assert event["attributes"] == [{"key": "note", "value": {"stringValue": "Grüße"}}]
    listed = service.get("/api/v1/traces?service=bank&limit=1000").json()["traces"]
    assert trace_id in {row["trace_id"] for row in listed}


def test_tenants_see_only_their_own_traces(service: Running) -> None:
    trace_id, _ = pay(service, 2000, tenant="acme")
    assert service.trace(trace_id, "acme")["signals"] == []  # it has no rules of its own
    assert service.get(f"/api/v1/traces/{trace_id}").status_code == 404
    assert service.get("/api/v1/rules", "acme").json()["rules"] == []


def test_both_listeners_count_sent_spans(service: Running) -> None:
    before = service.samples(service.api)
    trace_id, _ = pay(service, 2000)
    wait_for(lambda: service.signals(trace_id))
    for listener in (service.api, service.metrics):
        after = service.samples(listener)
        assert after["betrace_span_ingestion_total"] == before["betrace_span_ingestion_total"] + 2
        name = 'betrace_signals_total{kind="raised",severity="critical"}'
        assert after[name] == before[name] + 1
        assert after["betrace_spans_evaluated_total"] == after["betrace_span_ingestion_total"]


def test_readiness(service: Running) -> None:
    answer = service.get("/readyz")
    assert answer.status_code == 200
    assert {part["status"] for part in answer.json()["components"].values()} == {"ok"}
    assert service.get("/livez").json() == {"status": "ok"}
