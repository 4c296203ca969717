"""A service that says what the test wrote down, and remembers what it was asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import trio

from betrace.service.api.backend import RuleExistsError
from betrace.service.rules.definition import make_rule
from betrace.service.rules.store import RuleConflictError, RuleNotFoundError, RuleReadOnlyError
from betrace.service.storage.duck.queries import SummaryRow

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
    searched_to: int | None = None
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
        start = int(query.cursor or 0)
        end = start + query.limit
        return found[start:end], str(end) if len(found) > end else None

    def signal(self, tenant, signal_id):
        self._ask(tenant, signal_id)
        return next((s for s in self.signals_found if s["id"] == signal_id), None)

    def signal_summary(self, tenant, since, until, bucket_ns):
        self._ask(tenant, since, until, bucket_ns)
        return self.summary

    def traces(self, tenant, query):
        self._ask(tenant, query)
        return self.traces_found[: query.limit], "7", self.searched_to

    def trace(self, tenant, trace_id):
        self._ask(tenant, trace_id)
        return next((t for t in self.traces_found if t["trace_id"] == trace_id), None)

    def rules(self, tenant):
        self._ask(tenant)
        return [rule for (owner, _), rule in sorted(self.saved.items()) if owner == tenant]

    def rule(self, tenant, rule_id):
        self._ask(tenant, rule_id)
        if (tenant, rule_id) not in self.saved:
            raise RuleNotFoundError(f"there is no rule '{rule_id}'")
        return self.saved[tenant, rule_id]

    def put_rule(self, tenant, rule_id, definition, if_match):
        self._ask(tenant, rule_id, definition, if_match)
        make_rule({**definition, "id": rule_id})
        self._check(tenant, rule_id, if_match)
        before = self.saved.get((tenant, rule_id))
        number = int(before["etag"][1:-1]) + 1 if before else 1
        self.saved[tenant, rule_id] = {"id": rule_id, **definition, "etag": f'"{number}"'}
        return self.saved[tenant, rule_id], before is None

    def delete_rule(self, tenant, rule_id, if_match):
        self._ask(tenant, rule_id, if_match)
        self._check(tenant, rule_id, if_match)
        del self.saved[tenant, rule_id]

    def _check(self, tenant, rule_id, if_match):
        if rule_id in self.read_only:
            raise RuleReadOnlyError("edit the file shop.yaml")
        saved = self.saved.get((tenant, rule_id))
        if if_match is None and saved is not None:
            raise RuleExistsError(saved["etag"])
        if if_match is not None and saved is None:
            raise RuleNotFoundError(f"there is no rule '{rule_id}'")
        if saved is not None and if_match not in ("*", saved["etag"]):
            raise RuleConflictError("the rule was changed meanwhile")

    def test_rule(self, condition, trace):
        self._ask(condition, trace)
        make_rule({"id": "trial", "condition": condition})
        return {"breach": True, "clause": "never", "counts": {}, "evidence": {}}


class ScriptedOperations:
    """What the stream shows of administration."""

    def breakers(self):
        return [{"name": "ledger", "state": "closed"}]

    def pipeline(self):
        return {"ingestion": "open", "drained": True, "waiting": {}, "stages": {}}


@dataclass
class ScriptedBackend:
    admin: Any = field(default_factory=ScriptedOperations)
    queries: ScriptedQueries = field(default_factory=ScriptedQueries)
    ready: bool = True
    subscribed: list[str] = field(default_factory=list)
    feeds: list[trio.MemorySendChannel] = field(default_factory=list)

    def components(self):
        return {"ledger": {"status": "ok", "detail": ""}}

    async def scrape(self):
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
