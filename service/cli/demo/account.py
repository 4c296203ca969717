"""What was due and what was found, of ``betrace demo --cluster``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from betrace.service.cli.common import print_table
from betrace.service.cli.demo.shop_process import Customer

Json = dict[str, Any]
Breach = tuple[str, str]  # rule and trace


@dataclass(slots=True)
class RuleAccount:
    """The signals of a rule. ``lost`` were due and not found, ``false`` were found and not due,
    ``doubled`` were stored more than once."""

    rule: str
    due: int = 0
    found: int = 0
    lost: int = 0
    false: int = 0
    doubled: int = 0


@dataclass(frozen=True, slots=True)
class Account:
    """All of it."""

    traces: int
    rules: list[RuleAccount]

    @property
    def total(self) -> RuleAccount:
        """The sums."""
        total = RuleAccount("all rules")
        for each in self.rules:
            total.due += each.due
            total.found += each.found
            total.lost += each.lost
            total.false += each.false
            total.doubled += each.doubled
        return total

    @property
    def ok(self) -> bool:
        """Whether exactly the due signals were found, each once."""
        total = self.total
        return self.traces > 0 and not (total.lost or total.false or total.doubled)

    def to_json(self) -> Json:
        """For ``--json``."""
        total = asdict(self.total)
        del total["rule"]
        rules = [asdict(each) for each in self.rules]
        return {"ok": self.ok, "traces": self.traces, **total, "rules": rules}

    def show(self) -> None:
        """Print the table, and a sentence."""
        total = self.total
        head = ("RULE", "DUE", "FOUND", "LOST", "FALSE", "DOUBLED")
        print_table(head, [tuple(asdict(each).values()) for each in (*self.rules, total)])
        print_table(
            (
                f"{self.traces} traces, {total.found} of {total.due} signals found: "
                f"{total.lost} lost, {total.false} false, {total.doubled} doubled",
            ),
            (),
        )


def compare(customers: Iterable[Customer], signals: Iterable[Json]) -> Account:
    """Compare the customers' traces with all signals that are stored."""
    customers = list(customers)
    due: set[Breach] = {(rule, each.trace_id) for each in customers for rule in each.expected}
    active: set[Breach] = set()
    stored: Counter[tuple[Any, ...]] = Counter()
    for signal in signals:
        breach = signal["rule_id"], signal["trace_id"]
        stored[(*breach, signal.get("episode", 0), signal["kind"])] += 1
        if signal["kind"] == "raised" and signal["status"] == "active":
            active.add(breach)
    rules: dict[str, RuleAccount] = {}
    for rule, _ in sorted(due | active):
        rules.setdefault(rule, RuleAccount(rule))
    for rule, _ in due:
        rules[rule].due += 1
    for rule, _ in active & due:
        rules[rule].found += 1
    for rule, _ in due - active:
        rules[rule].lost += 1
    for rule, _ in active - due:
        rules[rule].false += 1
    for (rule, *_), times in stored.items():
        rules.setdefault(rule, RuleAccount(rule)).doubled += times - 1
    return Account(len(customers), list(rules.values()))
