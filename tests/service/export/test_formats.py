"""Signals as OTLP log records and as Alertmanager webhooks."""

from __future__ import annotations

import json
from dataclasses import replace

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import SeverityNumber

from betrace.service.export.formats import alert_groups, alertmanager, otlp_logs
from betrace.service.signals import Kind
from tests.support.ledger_conformance import make


def test_a_log_record_describes_the_signal() -> None:
    signal = make(7)
    request = ExportLogsServiceRequest.FromString(otlp_logs([signal], "1.2"))
    (of_tenant,) = request.resource_logs
    resource = {a.key: a.value.string_value for a in of_tenant.resource.attributes}
    assert resource == {"service.name": "betrace", "betrace.tenant": "shop"}
    (scope,) = of_tenant.scope_logs
    assert (scope.scope.name, scope.scope.version) == ("betrace", "1.2")
    (record,) = scope.log_records
    assert record.time_unix_nano == signal.detected_at
    assert record.severity_number == SeverityNumber.SEVERITY_NUMBER_ERROR
    assert record.severity_text == "high"
    assert record.trace_id.hex() == signal.trace_id
    assert record.span_id.hex() == "00f067aa0ba902b7"
    assert record.body.string_value == signal.message
    assert record.event_name == "betrace.signal"
    said = {a.key.removeprefix("betrace."): a.value.string_value for a in record.attributes}
    assert said == {
        "id": signal.id,
        "kind": "raised",
        "rule.id": "r1",
        "rule.version": "0" * 16,
        "clause": "never",
        "counts": json.dumps(signal.counts, separators=(",", ":")),
        "evidence": json.dumps(signal.evidence, separators=(",", ":")),
        "label.team": "checkout",
    }


def test_a_log_record_has_the_service_of_the_trace() -> None:
    signal = replace(make(7), context={"service": "bank"})
    request = ExportLogsServiceRequest.FromString(otlp_logs([signal], "1.2"))
    (record,) = request.resource_logs[0].scope_logs[0].log_records
    said = {a.key: a.value.string_value for a in record.attributes}
    assert said["betrace.service"] == "bank"


def test_tenants_are_resources_and_a_signal_without_evidence_has_no_span() -> None:
    signals = [make(1, evidence={}), make(2, tenant="other"), make(3)]
    request = ExportLogsServiceRequest.FromString(otlp_logs(signals, ""))
    counts = [len(r.scope_logs[0].log_records) for r in request.resource_logs]
    assert counts == [2, 1]
    assert request.resource_logs[0].scope_logs[0].log_records[0].span_id == b""


def test_a_raised_signal_is_a_firing_alert() -> None:
    signal = make(7, detected_at=1_790_000_000_000_000_005)
    sent = json.loads(alertmanager([signal], "https://b.example"))
    assert {key: sent[key] for key in ("version", "status", "receiver", "externalURL")} == {
        "version": "4",
        "status": "firing",
        "receiver": "betrace",
        "externalURL": "https://b.example",
    }
    assert sent["groupLabels"] == {"alertname": "r1", "tenant": "shop"}
    (alert,) = sent["alerts"]
    assert alert["labels"] == {
        "team": "checkout",
        "alertname": "r1",
        "tenant": "shop",
        "severity": "high",
        "trace_id": signal.trace_id,
    }
    assert alert["startsAt"] == "2026-09-21T14:13:20.000000005Z"
    assert alert["endsAt"] == "0001-01-01T00:00:00Z"
    assert alert["generatorURL"] == f"https://b.example/api/v1/signals/{signal.id}"
    assert sent["commonLabels"] == alert["labels"]


def test_a_retraction_resolves_the_alert_of_its_signal() -> None:
    raised, retracted = make(7), make(7, kind=Kind.RETRACTED)
    sent = json.loads(alertmanager([retracted], ""))
    (alert,) = sent["alerts"]
    (first,) = json.loads(alertmanager([raised], ""))["alerts"]
    assert (alert["status"], sent["status"]) == ("resolved", "resolved")
    assert alert["fingerprint"] == first["fingerprint"] == raised.id[:16]
    assert alert["labels"] == first["labels"]
    assert alert["annotations"]["reason"] == "late spans"
    assert alert["endsAt"] == alert["startsAt"]
    assert alert["generatorURL"] == ""


def test_a_rules_labels_do_not_replace_builtin_labels() -> None:
    sent = json.loads(alertmanager([make(1, labels={"tenant": "x", "alertname": "y"})], ""))
    assert sent["alerts"][0]["labels"]["tenant"] == "shop"
    assert sent["alerts"][0]["labels"]["alertname"] == "r1"


def test_groups_have_one_tenant_and_rule() -> None:
    signals = [make(1), make(2, rule="r2"), make(3), make(4, tenant="other")]
    assert [[s.trace_id[-1] for s in group] for group in alert_groups(signals)] == [
        ["1", "3"],
        ["2"],
        ["4"],
    ]
    both = json.loads(alertmanager([make(1), make(3)], ""))
    assert "trace_id" not in both["commonLabels"]
    assert both["commonLabels"]["severity"] == "high"


def test_signals_link_to_their_pages() -> None:
    def page_url(path: str, tenant: str) -> str:
        return f"https://b.example{path}?tenant={tenant}"

    raised, retracted = make(7), make(7, kind=Kind.RETRACTED)
    page = f"https://b.example/signals/{raised.id}?tenant=shop"
    sent = json.loads(alertmanager([raised, retracted], "https://old.example", page_url))
    assert [each["generatorURL"] for each in sent["alerts"]] == [page, page]
    request = ExportLogsServiceRequest.FromString(otlp_logs([retracted], "1", page_url))
    (record,) = request.resource_logs[0].scope_logs[0].log_records
    found = {each.key: each.value.string_value for each in record.attributes}
    assert found["betrace.url"] == page
