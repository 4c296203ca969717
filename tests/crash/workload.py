"""Random, reproducible traces for the crash tests, with the expected verdicts.

If a trace is decided before all of its spans have arrived, the verdict is wrong until the rest
arrives and the trace is decided again. With these rules, further spans change a verdict at most
once: they either end a breach or never do. Traces for the other kind of rule (locks) are sent in a
single request.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from betrace.service.rules.definition import make_rule
from betrace.service.rules.syntax import RuleSyntax
from tests.support.oracle import OracleSpan, breach

TENANTS = ("default", "acme", "globex")

CONDITIONS = {
    "charge-checked": "when { charge.where(amount > 1000) } always { fraud_check }",
    "audit-first": "when { charge } always { audit before charge }",
    "few-loops": "never { count(loop) > 3 }",  # early
    "no-secrets": 'never { secret.read.where(span:service == "vault") }',  # early
    "list-queries": 'when { "GET /list" } always { count(db.*) >= 2 }',
    "error-alert": "when { *.where(span:status == error) } always { alert }",
    "locks-balance": "never { count(lock) != count(unlock) }",
}
RULES_OF = {
    "default": tuple(CONDITIONS),
    "acme": ("charge-checked", "few-loops", "locks-balance"),
    "globex": ("audit-first", "list-queries", "error-alert", "no-secrets"),
}

Active = frozenset[tuple[str, str, str]]
"""Active signals as (tenant, trace id, rule id)."""


def write_rules(directory: Path) -> None:
    """Write the rule files of all tenants."""
    for tenant, ids in RULES_OF.items():
        folder = directory if tenant == "default" else directory / tenant
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["rules:"]
        for each in ids:
            lines += [
                f"  - id: {each}",
                "    severity: high",
                f"    condition: '{CONDITIONS[each]}'",
            ]
        (folder / "rules.yaml").write_text("\n".join(lines) + "\n")


@dataclass(slots=True)
class Part:
    """Spans of one trace that are sent together, ``after`` seconds after its start."""

    tenant: str
    spans: list[OracleSpan]
    after: float


@dataclass(slots=True)
class Traces:
    """Makes and remembers traces. Some spans arrive later than ``idle``, the idle time of the
    service in seconds."""

    rng: random.Random
    idle: float = 1.0
    tenants: tuple[str, ...] = TENANTS
    made: dict[tuple[str, str], list[OracleSpan]] = field(default_factory=dict)

    def new(self) -> list[Part]:
        """Return the parts of a new trace."""
        rng = self.rng
        tenant = rng.choice(self.tenants)
        trace_id = rng.randbytes(16)
        whole = rng.random() < 0.3
        spans = self._spans(trace_id, whole)
        self.made[tenant, trace_id.hex()] = spans
        order = rng.sample(spans, len(spans))
        if rng.random() < 0.2:
            order[-1].attributes["trace.complete"] = True
        if whole:
            return [Part(tenant, order, 0.0)]
        cuts = sorted(rng.sample(range(1, len(order)), min(len(order) - 1, rng.randint(0, 3))))
        parts, after = [], 0.0
        for first, last in zip([0, *cuts], [*cuts, len(order)], strict=True):
            parts.append(Part(tenant, order[first:last], after))
            late = rng.random() < 0.15
            after += rng.uniform(self.idle, 5 * self.idle) if late else rng.uniform(0, 0.4)
        return parts

    def _spans(self, trace_id: bytes, whole: bool) -> list[OracleSpan]:
        rng = self.rng
        names = ["POST /pay"]
        names += ["charge"] * (rng.random() < 0.6) + ["fraud_check"] * (rng.random() < 0.6)
        names += ["audit"] * (rng.random() < 0.6) + ["alert"] * (rng.random() < 0.3)
        names += ["loop"] * rng.choice((0, 0, 2, 3, 4, 6)) + ["secret.read"] * (rng.random() < 0.1)
        if rng.random() < 0.3:
            names += ["GET /list"] + ["db.get"] * rng.randint(0, 2) + ["db.put"] * rng.randint(0, 1)
        if whole:
            locks = rng.randint(0, 2)
            names += ["lock"] * locks + ["unlock"] * (locks + rng.choice((0, 0, 1)))
        if rng.random() < 0.03:
            names += ["step"] * rng.randint(150, 600)
        base = 1_700_000_000_000_000_000
        broken = rng.randrange(len(names)) if rng.random() < 0.15 else -1
        spans = []
        for number, name in enumerate(names):
            start = base + rng.randrange(1000) * 1000
            spans.append(
                OracleSpan(
                    name=name,
                    trace_id=trace_id,
                    span_id=(number + 1).to_bytes(8, "big"),
                    start=start,
                    end=start + rng.randrange(10**6),
                    status="error" if number == broken else "unset",
                    attributes={"amount": rng.choice((10, 1000, 1001, "2000"))},
                    resource={"service.name": rng.choice(("shop", "vault"))},
                )
            )
        return spans

    def active(self) -> Active:
        """Return the signals that must be active when every span has arrived. Tenants without
        rules here are left out."""
        return frozenset(
            (tenant, trace_id, rule)
            for (tenant, trace_id), spans in self.made.items()
            for rule in broken(RULES_OF.get(tenant, ()), spans)
        )


@cache
def syntax(rule: str) -> RuleSyntax:
    """The parsed condition of a rule."""
    return make_rule({"id": rule, "condition": CONDITIONS[rule]}).syntax


def broken(rules: Iterable[str], spans: Sequence[OracleSpan]) -> list[str]:
    """The rules that a trace breaks."""
    return [rule for rule in rules if breach(syntax(rule), spans) is not None]
