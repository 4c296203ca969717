"""Signals, traces, rules, dead letters and tenants of the fake API."""

from __future__ import annotations

from typing import Any

TRACE = "7dc62746122d4243380984c736e3a8f3"
BEGUN = 1_700_000_000_000_000_000


def signal(number: int, **more: Any) -> dict[str, Any]:
    """A signal of the second ``number`` after the tests begin."""
    return {
        "id": f"{number:032x}",
        "tenant": "default",
        "rule_id": "fraud-check",
        "rule_version": "566b9383915a782e",
        "severity": "critical",
        "kind": "raised",
        "clause": "always",
        "trace_id": TRACE,
        "detected_at": f"2023-11-14T22:13:{20 + number:02}.123456789Z",
        "early": False,
        "counts": {"charge.where(amount > 1000)": 1, "fraud_check": 0},
        "evidence": {"charge.where(amount > 1000)": ["00000000000000a3"]},
        "message": f"Payments over 1000 are checked: missing: fraud_check ({number})",
        "labels": {"team": "payments"},
        "reason": None,
        "context": None,
        "episode": 0,
        "status": "active",
        "service": "frontend",
        **more,
    }


def signals() -> list[dict[str, Any]]:
    return [
        signal(5),
        signal(4, rule_id="slow-checkout", severity="medium", clause=None, message="A slow one"),
        signal(3, severity="high", rule_id="retries", message="Tried [bold]five[/] times"),
        signal(2, status="retracted", rule_id="retries", severity="low", message="Not any more"),
    ]


def span(identity: str, parent: str, name: str, start: int, end: int, **more: Any) -> Any:
    """A span. Times are in milliseconds after the trace begins."""
    return {
        "traceId": TRACE,
        "spanId": identity,
        "parentSpanId": parent,
        "name": name,
        "startTimeUnixNano": str(BEGUN + start * 1_000_000),
        "endTimeUnixNano": str(BEGUN + end * 1_000_000),
        **more,
    }


def of_service(name: str, *spans: Any) -> dict[str, Any]:
    attribute = {"key": "service.name", "value": {"stringValue": name}}
    return {"resource": {"attributes": [attribute]}, "scopeSpans": [{"spans": list(spans)}]}


def trace() -> dict[str, Any]:
    return {
        "trace_id": TRACE,
        "state": "closed",
        "duration_ns": 120_000_000,
        "spans": 4,
        "errors": 1,
        "missing": 0,
        "omitted": 0,
        "resourceSpans": [
            of_service("frontend", span("00000000000000a1", "", "POST /checkout", 0, 120)),
            of_service(
                "payment",
                span("00000000000000a3", "00000000000000a2", "charge", 40, 100),
                span(
                    "00000000000000a4",
                    "00000000000000a3",
                    "attempt",
                    60,
                    90,
                    status={"code": 2},
                ),
            ),
            of_service("checkout", span("00000000000000a2", "00000000000000a1", "order", 10, 110)),
        ],
    }


def row() -> dict[str, Any]:
    """An entry of the list of traces."""
    return {
        "trace_id": TRACE,
        "start": "2023-11-14T22:13:20.000000000Z",
        "duration_ns": 120_000_000,
        "spans": 4,
        "errors": 1,
        "root_name": "POST /checkout",
        "root_service": "frontend",
    }


def rule(identity: str, **more: Any) -> dict[str, Any]:
    return {
        "id": identity,
        "name": f"What {identity} is about",
        "description": "Finance control 4.2",
        "severity": "critical",
        "enabled": True,
        "labels": {"team": "payments"},
        "condition": "when   { charge.where(amount > 1000) }\nalways { fraud_check }\n",
        "version": "566b9383915a782e",
        "etag": f'"{identity}-1"',
        "editable": True,
        "source": f"default/{identity}.yaml",
        "active_signals": 12,
        **more,
    }


def rules() -> list[dict[str, Any]]:
    slow = '// slow\n"POST /checkout".where(span:duration >= 1s)\n'
    return [
        rule("fraud-check"),
        rule(
            "retries",
            severity="high",
            condition="never { count(attempt) > 4 }",
            editable=False,
            source="shop.yaml",
        ),
        rule("slow-checkout", severity="medium", enabled=False, condition=slow),
    ]


MUTE = {
    "since": "2023-11-14T22:13:20Z",
    "until": "2023-11-15T00:13:20Z",
    "reason": "the bank is migrating",
    "by": "ann",
}

SUMMARY = {"total": 9, "retracted": 1, "by_rule": {"fraud-check": 7, "retries": 2}}


def letters() -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "tenant": "default",
            "stage": "rule-evaluation",
            "kind": "due",
            "bytes": 1541,
            "weight": 3,
            "error": "BreakerOpen: circuit breaker rule-evaluation is forced_open",
            "transient": number < 3,
            "attempts": number,
            "first_failed": "2023-11-14T22:13:00.000000000Z",
            "last_failed": "2023-11-14T22:13:10.000000000Z",
            "next_retry": "2023-11-14T22:14:10.000000000Z" if number < 3 else None,
        }
        for number in (1, 2, 3)
    ]


PAYLOAD = {"closed": True, "rules": ["fraud-check"], "traces": [TRACE]}


def tenants() -> list[dict[str, Any]]:
    key = {"kid": "k" * 43, "createdAt": "2023-11-01T00:00:00Z", "expiresAt": None}
    return [
        {
            "name": "acme",
            "state": "active",
            "createdAt": "2023-11-01T00:00:00Z",
            "quota": 5000,
            "keys": [key],
        },
        {"name": "default", "state": "implicit", "createdAt": None, "quota": None, "keys": []},
    ]


CHECKPOINT = {
    "savedAt": "2023-11-14T22:13:00.000000000Z",
    "ageSeconds": 20.0,
    "bytes": 1_163_060,
    "files": 2,
    "failures": 0,
    "saving": False,
    "toReplayBytes": 4_377_812,
    "covers": {"openTraces": 1620, "tenants": 2},
}

FALLBACKS = [
    {"name": "ledger", "pendingRecords": 42, "pendingBytes": 9000},
    {"name": "duckdb", "pendingRecords": 0, "pendingBytes": 0},
]


def answer(method: str, path: str) -> Any:
    """The answer to a request about these records; None for other requests."""
    name = path.rsplit("/", 1)[-1]
    found = {
        "/api/v1/signals": {"signals": signals(), "next": None},
        "/api/v1/signals/summary": SUMMARY,
        "/api/v1/traces": {"traces": [row()], "next": None},
        f"/api/v1/traces/{TRACE}": trace(),
        "/api/v1/rules": {"rules": rules()},
        "/api/admin/dead-letters": {"deadLetters": letters(), "next": None},
        "/api/admin/tenants": {"tenants": tenants(), "next": None},
        "/api/admin/checkpoint": CHECKPOINT,
        "/api/admin/fallback": {"fallbacks": FALLBACKS},
    }
    if method == "GET":
        if path in found:
            return found[path]
        for start, those, key in (
            ("/api/v1/signals/", signals(), "id"),
            ("/api/v1/rules/", rules(), "id"),
            ("/api/admin/dead-letters/", [each | {"payload": PAYLOAD} for each in letters()], "id"),
        ):
            if path.startswith(start):
                return next((each for each in those if each[key] == name), None)
        return None
    return _done(method, path, name)


def _done(method: str, path: str, name: str) -> Any:
    if path == "/api/v1/rules/validate":
        return {"valid": True, "errors": []}
    if path == "/api/v1/rules/test":
        given = signal(1)
        verdict = {"breach": True, "clause": "always", "message": "missing: fraud_check"}
        return verdict | {n: given[n] for n in ("counts", "evidence")}
    if path.endswith("/acknowledge"):
        return {"at": "2023-11-14T22:13:21Z", "by": "ann", "note": "I look"}
    if path.endswith("/mute"):
        return MUTE if method == "PUT" else {}
    if path.startswith("/api/v1/rules/"):
        return rule(name) if method == "PUT" else {}
    if path == "/api/admin/dead-letters/retry":
        return {"retried": 3}
    if path.startswith("/api/admin/dead-letters/"):
        return {"retried" if name == "retry" else "discarded": 1}
    if path == "/api/admin/checkpoint":
        return CHECKPOINT
    if path == "/api/admin/fallback/replay":
        return {"fallbacks": FALLBACKS}
    if path == "/api/admin/tenants":
        return {"name": "shop", "state": "active"}
    if path.startswith("/api/admin/tenants/"):
        if method == "DELETE" and "/keys/" not in path:
            return {"tenant": name, "state": "deleted"}
        return tenants()[0] | {"quota": 700}
    return None


def cluster() -> dict[str, Any]:
    """What a query node says of a cluster: all is well in the first partitions only."""

    def partition(number: int, **more: Any) -> dict[str, Any]:
        return {
            "partition": number,
            "owner": f"evaluator-{1 + number % 2}",
            "epoch": 3 + number,
            "applied": 10_200 + number,
            "last": 10_201 + number,
            "lag": 1,
            "evaluatedTo": 51_000 + number,
            "logTimeNs": BEGUN,
            "counts": {"spans": 4_000_000 + number, "deadLettered": 0},
            "problem": None,
            **more,
        }

    return {
        "node": "query-1",
        "roles": ["query"],
        "nodes": [
            {"name": "edge-1", "roles": ["edge"], "draining": False},
            {"name": "evaluator-1", "roles": ["evaluator"], "draining": False},
            {"name": "evaluator-2", "roles": ["evaluator"], "draining": True},
            {"name": "query-1", "roles": ["query"], "draining": False},
        ],
        "partitions": [
            partition(0),
            partition(1),
            partition(2, lag=25_000, last=35_202),
            partition(3, owner=None, epoch=None, last=None, lag=None),
            partition(4, owner="evaluator-9"),
            partition(5, problem="OUT_5 has no leader"),
        ],
        "duties": {"alerts": "query-1"},
        "rulesProblem": None,
        "index": {"requests": 2, "behind": 0},
    }
