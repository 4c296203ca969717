"""Tries rules on one trace with the pipeline's engine; nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from betrace.service.otlp.columns import ERROR, ERROR_OFF, TRACE_HI, TRACE_LO
from betrace.service.otlp.wire import ERRORS, scan_bodies
from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.wording import breach_text
from betrace.service.traces.decide import NEVER_BROKEN, Breach, decide
from betrace.service.traces.due import DueTraces
from betrace.service.traces.slices import CpuSlice, SliceOver
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import raise_signal

_MASK = 2**64 - 1


class TrialError(ValueError):
    """The spans cannot be evaluated; the message says why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of a rule on a trace. ``clause`` is the broken one (always | never), None without
    a breach; ``counts`` and ``evidence`` are by check, as in a signal; ``message`` says why the
    trace breaks the rule, None if it does not."""

    rule_id: str
    breach: bool
    clause: str | None
    counts: dict[str, int]
    evidence: dict[str, list[str]]
    message: str | None


class Trial:
    """Collects the spans of one trace and evaluates compiled rules on it.

    With ``trace_id`` (32 hex digits) spans of other traces are ignored; without it all spans must
    belong to one trace. If ``cpu`` is used up, :meth:`add` raises :exc:`TrialError`.
    """

    def __init__(
        self, rules: CompiledRules, trace_id: str | None = None, cpu: CpuSlice | None = None
    ) -> None:
        self._cpu = cpu
        self._traces = TenantTraces("trial", rules)
        self._wanted: str | None = trace_id
        self._anything = trace_id is None
        self.spans = 0
        """Distinct spans added."""

    def add(self, body: bytes) -> int:
        """Add the spans of a request (protobuf, decompressed); returns how many are of the trace.
        Raises :exc:`TrialError`."""
        batch = scan_bodies("trial", [body])
        row = batch.bodies[0]
        if row[ERROR]:
            raise TrialError(f"{ERRORS[int(row[ERROR])]} (at byte {int(row[ERROR_OFF])})")
        if self._anything and len(batch):
            ids = np.unique(batch.spans[:, [TRACE_HI, TRACE_LO]], axis=0)
            hi, lo = (int(half) & _MASK for half in ids[0])
            found = f"{hi:016x}{lo:016x}"
            if len(ids) > 1 or self._wanted not in (None, found):
                raise TrialError("it has spans of several traces; pass the spans of one trace")
            self._wanted = found
        elif len(batch):
            value = int(self._wanted or "0", 16)
            halves = np.array([value >> 64, value & _MASK], np.uint64).view(np.int64)
            batch.spans = batch.spans[(batch.spans[:, [TRACE_HI, TRACE_LO]] == halves).all(axis=1)]
        if len(batch):
            try:
                parts = self._traces.fold(batch, now=1, slice=self._cpu)
            except SliceOver:
                raise TrialError(
                    "evaluating it takes too much processor time; use fewer or cheaper patterns"
                ) from None
            for _, folded in parts:
                self.spans += len(batch) - folded.repeated
        return len(batch)

    def verdicts(self, *, complete: bool = True) -> list[Verdict]:
        """The verdict of each enabled rule; may be called once. If the trace is not ``complete``,
        only breaches that no further span can undo are reported. Raises :exc:`TrialError` if there
        are no spans."""
        closed = self._traces.close_due(now=2, idle_ns=0)
        if not closed:
            raise TrialError("it has no span with a valid trace id and span id")
        due = closed[0]
        due.closed = complete
        broken = {breach.rule: breach for breach in decide(due, raised_early=False)}
        return [_verdict(due, k, broken.get(k)) for k in range(len(due.rules.rules))]


def _verdict(due: DueTraces, rule: int, breach: Breach | None) -> Verdict:
    # A signal also has the counts and evidence if the rule is not broken.
    signal = raise_signal(due, breach or Breach(0, rule, NEVER_BROKEN, early=False), 0)
    if breach is None:
        return Verdict(signal.rule_id, False, None, signal.counts, signal.evidence, None)
    message = breach_text(due.rules.rules[rule].syntax, signal.clause, signal.counts)
    return Verdict(signal.rule_id, True, signal.clause, signal.counts, signal.evidence, message)
