"""A tenant whose only rule changes between two conditions while traces are sent.

A trace is decided by the condition in force when it was opened. Which one that was is known only
for traces that began well before or after a change, so the check is that each trace has exactly
the signals of one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from betrace.service.rules.definition import make_rule
from tests.crash.victim import ServiceProcess
from tests.crash.workload import Active, Traces
from tests.support.oracle import breach

TENANT = "changing"
RULE = "moving-target"
CONDITIONS = (
    "when { charge } always { fraud_check }",
    "when { charge } always { audit }",
)


class RuleChanges:
    """Changes the rule through the API of one query node after the other."""

    def __init__(self, queries: Sequence[ServiceProcess]) -> None:
        self._queries = queries
        self._number = 0
        self.made = 0
        """Changes that the API confirmed."""

    def change(self) -> bool:
        """Change the rule; returns whether the API confirmed it. Without an answer it may or may
        not have changed."""
        self._number += 1
        rule = {"severity": "high", "condition": CONDITIONS[self._number % 2]}
        query = self._queries[self._number % len(self._queries)]
        url = f"http://{query.api}/api/v1/rules/{RULE}"
        headers = {"x-scope-orgid": TENANT} | ({"if-match": "*"} if self.made else {})
        try:
            answer = httpx.put(url, json=rule, headers=headers, timeout=20, trust_env=False)
        except httpx.HTTPError:
            return False
        assert answer.status_code in (200, 201, 412, 503), answer.text
        self.made += answer.status_code in (200, 201)
        return answer.status_code in (200, 201)


def explained(traces: Traces, found: Active) -> list[str]:
    """The traces of the tenant whose signals belong to neither condition."""
    syntaxes = [make_rule({"id": RULE, "condition": each}).syntax for each in CONDITIONS]
    shown = {trace_id for tenant, trace_id, _ in found if tenant == TENANT}
    return [
        trace_id
        for (tenant, trace_id), spans in traces.made.items()
        if tenant == TENANT
        and (trace_id in shown) not in {breach(syntax, spans) is not None for syntax in syntaxes}
    ]
