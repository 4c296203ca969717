"""Spans and signals for tests of the API."""

from __future__ import annotations

import time

from betrace.service.signals import Kind, Signal, rule_version, signal_id

SECOND = 10**9
NOW = time.time_ns() // SECOND * SECOND
TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "1" * 32
RULE = {"condition": "never { payment.bypass }", "severity": "critical"}


def span(name, number, trace=TRACE, **attributes):
    return {
        "traceId": trace,
        "spanId": f"{number:016x}",
        "name": name,
        "startTimeUnixNano": str(NOW + number),
        "endTimeUnixNano": str(NOW + number + 5),
        "attributes": [
            {"key": key.replace("_", "."), "value": {"boolValue": value}}
            for key, value in attributes.items()
        ],
    }


def otlp(*spans):
    return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


def make_signal(number=0, rule="bypass", kind=Kind.RAISED):
    version = rule_version(RULE["condition"])
    return Signal(
        id=signal_id("default", rule, version, TRACE, kind),
        tenant="default",
        rule_id=rule,
        rule_version=version,
        severity="critical",
        kind=kind,
        clause="never",
        trace_id=TRACE,
        detected_at=NOW + number,
        early=False,
        counts={"payment.bypass": 1},
        evidence={"payment.bypass": [f"{2:016x}"]},
        message="broken",
    )
