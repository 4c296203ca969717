"""Signals counted by rule, and their exemplars."""

from __future__ import annotations

from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from betrace.service.api.metrics.exposition import OPEN_METRICS_TYPE, TEXT_TYPE
from betrace.service.api.signals_by_rule import OTHER, SignalsByRule
from betrace.service.rules.definition import Rule, make_rule
from betrace.service.signals import Kind
from tests.support.api_client import ApiClient
from tests.support.api_records import make_signal
from tests.support.inprocess import closed, running, send, settings, write_rules
from tests.support.spans import S

Rules = dict[str, tuple[Rule, ...]]


def rule(rule_id: str, **more: Any) -> Rule:
    return make_rule({"id": rule_id, "condition": "a", "severity": "high", **more})


def test_series_exist_from_the_load_of_a_rule_until_its_deletion() -> None:
    rules: Rules = {"acme": (rule("a"), rule("off", enabled=False)), "b": (rule("a"),)}
    counted = SignalsByRule(lambda: rules, 100, lambda _: False)
    zero = {
        (tenant, "a", "high", kind, "false"): 0
        for tenant in ("acme", "b")
        for kind in ("raised", "retracted")
    }
    assert dict(counted.counts()) == zero
    rules = {"b": rules["b"]}
    assert {labels[0] for labels, _ in counted.counts()} == {"b"}
    rules = {}
    assert counted.counts() == []


def test_signals_are_counted_before_and_after_the_first_scrape() -> None:
    rules: Rules = {"default": (rule("a"),)}
    counted = SignalsByRule(lambda: rules, 100, lambda _: False)
    signals = [make_signal(0, "a"), make_signal(1, "a"), make_signal(2, "a", Kind.RETRACTED)]
    counted.add(signals[:1])
    labels = (signals[0].tenant, "a", signals[0].severity, "raised", "false")
    assert dict(counted.counts())[labels] == 1
    counted.add(signals[1:])
    assert dict(counted.counts())[labels] == 2
    assert dict(counted.counts())[*labels[:3], "retracted", "false"] == 1
    assert counted.exemplars()[labels].labels == {"trace_id": signals[1].trace_id}


def test_rules_beyond_the_maximum_are_counted_together() -> None:
    rules: Rules = {"default": tuple(rule(f"r{n:04}") for n in range(50))}
    counted = SignalsByRule(lambda: rules, 10, lambda _: False)
    assert len(counted.counts()) == 10
    signals = [make_signal(n, f"r{n:04}") for n in range(50)]
    counted.add(signals)
    found = dict(counted.counts())
    assert sum(found.values()) == 50
    severity = signals[0].severity
    assert found[OTHER, OTHER, severity, "raised", "false"] >= 40
    assert len(found) == 11
    for n in range(10_000):
        counted.add([make_signal(n, f"other{n}")])
    assert len(counted.counts()) == 11


async def test_openmetrics_has_exemplars(tmp_path) -> None:
    write_rules(tmp_path, {"bad": "never { a }", "kept": "never { b }"})
    async with running(settings(tmp_path)) as service:
        client = ApiClient(service)
        before = (await client.get("/metrics")).decode()
        await send(service, [S(1)])
        await closed(service)
        plain = (await client.get("/metrics")).decode()
        assert client.headers["content-type"] == TEXT_TYPE
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        text = (await client.get("/metrics", Accept=accept)).decode()
        assert client.headers["content-type"] == OPEN_METRICS_TYPE
        signal = (await client.get("/api/v1/signals"))["signals"][0]

    series = 'betrace_rule_signals_total{kind="raised",muted="false",rule="%s",severity="medium",'
    assert series % "bad" + 'tenant="default"} 0.0\n' in before
    assert series % "bad" + 'tenant="default"} 1.0\n' in plain
    assert series % "kept" + 'tenant="default"} 0.0\n' in plain
    assert signal["trace_id"] not in plain

    families = {family.name: family for family in text_string_to_metric_families(text)}
    exemplars = {
        sample.labels["rule"]: sample.exemplar
        for sample in families["betrace_rule_signals"].samples
        if sample.labels["kind"] == "raised"
    }
    assert exemplars["bad"].labels == {"trace_id": signal["trace_id"]}
    assert exemplars["kept"] is None
    latency = families["betrace_end_to_end_latency_seconds"].samples
    traces = [sample.exemplar.labels for sample in latency if sample.exemplar]
    assert traces == [{"trace_id": signal["trace_id"]}]
