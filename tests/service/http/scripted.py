"""A service that says what the test wrote down, and remembers what it was asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import trio

from service.http.backend import (
    RuleConflictError,
    RuleInvalidError,
    RuleReadOnlyError,
    SummaryRow,
    TraceInvalidError,
)
from service.rules.parse import parse

TRACE = "0af7651916cd43dd8448eb211c80319c"


def signal(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{number:032x}",
        "tenant": "default",
        "rule_id": "payment",
        "rule_version": "v",
        "severity": "high",
        "kind": "raised",
        "status": "active",
        "clause": "never",
        "trace_id": TRACE,
        "detected_at": 1_700_000_000_123_456_789 - number,
        "early": False,
        "counts": {"a": 1},
        "evidence": {"a": ["b7ad6b7169203331"]},
        "labels": {},
        "message": "broken",
        **changes,
    }


@dataclass
class ScriptedQueries:
    signals_found: list[dict[str, Any]] = field(default_factory=list)
    traces_found: list[dict[str, Any]] = field(default_factory=list)
    summary: list[SummaryRow] = field(default_factory=list)
    saved: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    read_only: set[str] = field(default_factory=set)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    delay: float = 0.0
    error: Exception | None = None

    def _ask(self, *what: Any) -> None:
        self.asked.append(what)
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error

    def signals(self, tenant, query):
        self._ask(tenant, query)
        found = [s for s in self.signals_found if s["tenant"] == tenant]
        if query.after is not None:
            found = [s for s in found if (s["detected_at"], s["id"]) < query.after]
        return found[: query.limit]

    def signal(self, tenant, signal_id):
        self._ask(tenant, signal_id)
        return next((s for s in self.signals_found if s["id"] == signal_id), None)

    def signal_summary(self, tenant, since, until, bucket_ns):
        self._ask(tenant, since, until, bucket_ns)
        return self.summary

    def traces(self, tenant, query):
        self._ask(tenant, query)
        return self.traces_found[: query.limit]

    def trace(self, tenant, trace_id):
        self._ask(tenant, trace_id)
        return next((t for t in self.traces_found if t["trace_id"] == trace_id), None)

    def rules(self, tenant):
        self._ask(tenant)
        return [rule for (owner, _), rule in sorted(self.saved.items()) if owner == tenant]

    def rule(self, tenant, rule_id):
        self._ask(tenant, rule_id)
        return self.saved.get((tenant, rule_id))

    def put_rule(self, tenant, rule_id, rule, expected):
        self._ask(tenant, rule_id, rule, expected)
        self._check(tenant, rule_id, expected)
        if rule["condition"] == "bad":
            raise RuleInvalidError([{"message": "found a fault", "hint": "mend it", "line": 1}])
        before = self.saved.get((tenant, rule_id), {"revision": "0"})
        rule = {"id": rule_id, **rule, "revision": str(int(before["revision"]) + 1)}
        self.saved[tenant, rule_id] = rule
        return rule

    def delete_rule(self, tenant, rule_id, expected):
        self._ask(tenant, rule_id, expected)
        self._check(tenant, rule_id, expected)
        del self.saved[tenant, rule_id]

    def _check(self, tenant, rule_id, expected):
        if rule_id in self.read_only:
            raise RuleReadOnlyError("shop.yaml")
        saved = self.saved.get((tenant, rule_id))
        current = saved["revision"] if saved else None
        if expected == "*":
            if current is None:
                raise RuleConflictError(None)
        elif expected != current:
            raise RuleConflictError(current)

    def test_rule(self, condition, trace):
        self._ask(condition, trace)
        parse(condition)
        if b"resourceSpans" not in trace:
            raise TraceInvalidError("it has no resourceSpans")
        return {"breach": True, "clause": "never", "counts": {}, "evidence": {}}


@dataclass
class ScriptedBackend:
    queries: ScriptedQueries = field(default_factory=ScriptedQueries)
    ready: bool = True
    subscribed: list[str] = field(default_factory=list)
    feeds: list[trio.MemorySendChannel] = field(default_factory=list)

    def components(self):
        return {"ledger": {"status": "ok", "detail": ""}}

    def metrics_exposition(self):
        return b"# TYPE betrace_open_traces gauge\nbetrace_open_traces 3\n"

    def subscribe_signals(self, tenant):
        self.subscribed.append(tenant)
        send, receive = trio.open_memory_channel(10)
        self.feeds.append(send)
        return receive

    def queue_stats(self):
        return [{"name": "span-ingestion", "currentSize": 1}, {"name": "storage-write"}]

    def cache_stats(self):
        return {"ruleContainers": {"hitCount": 1}}

    def performance_metrics(self):
        return {"spanIngestionRate": 5.0}

    def trace_windows(self):
        return {"activeWindows": 2}

    def system_stats(self):
        return {"threads": 4}
