"""The engine without the pipeline: spans in, standing breaches out."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from service.otlp.wire import scan_bodies
from service.rules.compile import CompiledRules, compile_rules
from service.rules.syntax import RuleSyntax
from service.signals import Kind, Signal
from service.stages.evaluate import decide_due
from service.traces.due import DueTraces
from service.traces.tenant import TenantTraces


def compiled(rules: Sequence[RuleSyntax], version: str = "v1") -> CompiledRules:
    return compile_rules(
        [
            SimpleNamespace(
                id=f"r{i}",
                name=f"rule {i}",
                version=version,
                severity="high",
                labels={},
                enabled=True,
                syntax=rule,
            )
            for i, rule in enumerate(rules)
        ],
        version,
    )


class Engine:
    """Folds request bodies and keeps what the signals say: ``standing`` (trace id, rule id)."""

    def __init__(self, rules: Sequence[RuleSyntax], tenant: str = "t") -> None:
        self.traces = TenantTraces(tenant, compiled(rules))
        self.now = 1000
        self.standing: set[tuple[str, str]] = set()
        self.signals: list[Signal] = []

    def send(self, *bodies: bytes) -> None:
        self.now += 1
        batch = scan_bodies(self.traces.tenant, bodies)
        assert not batch.bodies[:, 4].any()
        for table, folded in self.traces.fold(batch, self.now):
            if folded.early is not None:
                self._decide(folded.early)
            if len(folded.completed):
                self._decide(table.close(folded.completed, self.now))

    def close(self) -> None:
        """Close all traces, as if they had been idle."""
        self.now += 1
        for due in self.traces.close_due(self.now + 1, 1):
            self._decide(due)

    def _decide(self, due: DueTraces) -> None:
        for signal in decide_due(due, self.now).signals:
            self.signals.append(signal)
            key = (signal.trace_id, signal.rule_id)
            if signal.kind is Kind.RAISED:
                self.standing.add(key)
            else:
                self.standing.discard(key)
