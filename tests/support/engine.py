"""The engine without the pipeline: spans in, active breaches out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.rules.format import format_rule
from betrace.service.rules.syntax import RuleSyntax
from betrace.service.signals import Kind, Signal
from betrace.service.traces.due import DueTraces
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.layout import HI, LO, POSITION_0, POSITION_COUNT, SPANS
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.signal_history import RuleVersion, SignalHistory, rule_signals
from betrace.service.traces.tenant_traces import Recalled, TenantTraces
from betrace.service.traces.verdicts import decide_due


def compiled(
    rules: Sequence[RuleSyntax], version: str = "v1", incomplete: str = "judge"
) -> CompiledRules:
    definitions = [
        make_rule({"id": f"r{i}", "condition": format_rule(rule), "incomplete": incomplete})
        for i, rule in enumerate(rules)
    ]
    return compile_rules(definitions, version)


def active(signals: Sequence[Signal]) -> set[tuple[str, str]]:
    """Trace and rule of the signals, in any order, that were raised and not retracted. Checks that
    each episode has at most one signal of each kind, and that only the last one is active."""
    ids: dict[tuple[str, str, int, Kind], str] = {}
    for s in signals:
        assert ids.setdefault((s.trace_id, s.rule_id, s.episode, s.kind), s.id) == s.id
    raised = {key[:3] for key in ids if key[3] is Kind.RAISED}
    left = [key for key in raised if (*key, Kind.RETRACTED) not in ids]
    assert not any((trace, rule, n + 1) in raised for trace, rule, n in left)
    found = {key[:2] for key in left}
    assert len(found) == len(left)
    return found


def signal_history(signals: Sequence[Signal], trace_id: str) -> SignalHistory:
    """The history of a trace, counted as the query store does."""
    of: dict[RuleVersion, dict[str, Signal]] = {}
    for signal in signals:
        if signal.trace_id == trace_id:
            of.setdefault((signal.rule_id, signal.rule_version), {})[signal.id] = signal
    return {
        rule: rule_signals(
            sum(s.kind is Kind.RAISED for s in own.values()),
            sum(s.kind is Kind.RETRACTED for s in own.values()),
            list(own.values())[-1].clause,
        )
        for rule, own in of.items()
    }


class Engine:
    """Folds request bodies and collects the signals; ``active`` are pairs (trace id, rule id).

    Its log is a list of bodies at the positions 1, 2, ...; its index has the positions and span
    counts of closed traces by (hi, lo).
    """

    def __init__(
        self,
        rules: Sequence[RuleSyntax],
        tenant: str = "t",
        incomplete: str = "judge",
    ) -> None:
        self.traces = TenantTraces(tenant, compiled(rules, incomplete=incomplete))
        self.now = 1000
        self.signals: list[Signal] = []
        self.log: list[bytes] = []
        self.index: dict[tuple[int, int], tuple[set[int], int]] = {}
        self.spilled: dict[tuple[int, int], set[int]] = {}
        self.closed = ClosedTraces(1 << 14)
        self.recalled = 0
        self.relational: RelationalRules | None = None

    def send(self, *bodies: bytes) -> None:
        self.now += 1
        batch = scan_bodies(self.traces.tenant, bodies)
        assert not batch.bodies[:, 4].any()
        batch.positions = np.array(self._append(bodies), np.int64)
        batch.received_ns = self.now
        for table, folded in self.traces.fold(batch, self.now, self.closed, self.history):
            self._spill(folded.spilled)
            if folded.early is not None:
                self._decide(folded.early)
            if len(folded.completed):
                self._decide(table.close(folded.completed, self.now))

    def _spill(self, spilled: Rows) -> None:
        for hi, lo, *positions in spilled.tolist():
            self.spilled.setdefault((hi, lo), set()).update(positions)

    def _append(self, bodies: Sequence[bytes]) -> list[int]:
        """Append to the log; returns the positions."""
        self.log += bodies
        return list(range(len(self.log) - len(bodies) + 1, len(self.log) + 1))

    def _body(self, position: int) -> bytes:
        return self.log[position - 1]

    def history(self, tenant: str, ids: Rows) -> Iterator[Recalled]:
        """Reads closed traces from the index and the log."""
        found = [pair for pair in map(tuple, ids.tolist()) if pair in self.index]
        if not found:
            return
        positions = sorted(set().union(*(self.index[pair][0] for pair in found)))
        batch = scan_bodies(tenant, [self._body(p) for p in positions])
        batch.positions = np.array(positions, np.int64)
        batch.received_ns = self.now
        self.recalled += len(found)
        histories = [
            signal_history(self.signals, f"{hi % 2**64:016x}{lo % 2**64:016x}") for hi, lo in found
        ]
        yield Recalled(np.array(found, np.int64), [True] * len(found), batch, ids[:0], histories)

    def forget(self) -> None:
        """Free all closed traces."""
        self.traces.evict(self.now + 10**12, 1, 0, self.closed)

    def close(self) -> None:
        """Close all traces, as if they had been idle."""
        self.now += 1
        for due in self.traces.close_due(self.now + 1, 1):
            self._decide(due)

    def restart(self) -> None:
        """Continue from a snapshot, as after a restart."""
        self.traces = TenantTraces.restored(self.traces.snapshot())

    @property
    def active(self) -> set[tuple[str, str]]:
        """What was raised and not retracted."""
        return active(self.signals)

    def _decide(self, due: DueTraces) -> None:
        for row in due.rows if due.closed else ():
            pair = (int(row[HI]), int(row[LO]))
            positions = set(row[POSITION_0 : POSITION_0 + row[POSITION_COUNT]].tolist())
            positions |= self.spilled.get(pair, set())
            self.index[pair] = positions | self.index.get(pair, (set(), 0))[0], int(row[SPANS])
        decided = decide_due(due, self.now, self.relational)
        if self.relational is not None:
            assert not decided.undecided
            self.relational.note(due, decided.signals)
        self.signals += decided.signals
