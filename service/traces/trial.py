"""Tries rules on one trace with the pipeline's engine; nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from betrace.service.otlp.columns import (
    ERROR,
    ERROR_OFF,
    HAS_PARENT,
    PARENT_ID,
    SPAN_ID,
    TRACE_HI,
    TRACE_LO,
    Rows,
    SpanBatch,
)
from betrace.service.otlp.columns import FLAGS as SPAN_FLAGS
from betrace.service.otlp.wire import ERRORS, scan_bodies
from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.patterns import TOO_LONG
from betrace.service.rules.read_columns import columns_of
from betrace.service.rules.relations import Judgement
from betrace.service.rules.wording import breach_text
from betrace.service.rules.workspace import FOREVER
from betrace.service.signals import incomplete_text
from betrace.service.traces.decide import NEVER_BROKEN, Breach, decide_or_ask
from betrace.service.traces.due import DueTraces
from betrace.service.traces.layout import HI, LO
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.slices import CpuSlice, SliceOver
from betrace.service.traces.tenant_traces import TenantTraces
from betrace.service.traces.verdicts import raise_signal
from betrace.service.traces.whole_trace import WholeTrace

_MASK = 2**64 - 1


TRIAL_SECONDS = 3.0
"""CPU seconds that the API spends on evaluating one trace for a caller."""


class TrialError(ValueError):
    """The spans cannot be evaluated; the message says why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of a rule on a trace. ``clause`` is the broken one (always | never), None without
    a breach; ``counts`` and ``evidence`` are by check, as in a signal; ``message`` says why the
    trace breaks the rule, None if it does not. Of a rule with ``for each`` that is broken,
    ``groups`` says by which groups; ``undecided`` says why a rule could not be judged, and
    ``skipped`` why it was not."""

    rule_id: str
    breach: bool
    clause: str | None
    counts: dict[str, int]
    evidence: dict[str, list[str]]
    message: str | None
    groups: dict[str, Any] | None = None
    undecided: str | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields; ``groups``, ``undecided`` and ``skipped`` are left out if they are empty."""
        optional = ("groups", "undecided", "skipped")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in optional}


class Trial:
    """Collects the spans of one trace and evaluates compiled rules on it.

    With ``trace_id`` (32 hex digits) spans of other traces are ignored; without it all spans must
    belong to one trace. Evaluating them takes at most ``seconds`` of CPU time: after that, spans
    are only counted, and there are no verdicts.
    """

    def __init__(
        self, rules: CompiledRules, trace_id: str | None = None, seconds: float = FOREVER
    ) -> None:
        self._seconds = seconds
        self.too_expensive = False
        """Whether the time is used up."""
        self._traces = TenantTraces("trial", rules)
        self._wanted: str | None = trace_id
        self._anything = trace_id is None
        self._relational = bool(rules.read_back)
        self._kept: list[bytes] = []
        self._ids: list[Rows] = []
        self._parents: list[Rows] = []
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
            self._ids.append(batch.spans[:, SPAN_ID].copy())  # the batch itself is large
            below = batch.spans[:, SPAN_FLAGS] & HAS_PARENT != 0
            self._parents.append(_distinct(batch.spans[below, PARENT_ID]))
        if self.too_expensive:
            self.spans += len(batch)
            return len(batch)
        if len(batch):
            self._fold(batch, body)
        return len(batch)

    def _fold(self, batch: SpanBatch, body: bytes) -> None:
        cpu = CpuSlice(self._seconds)
        if self._relational:
            self._kept.append(body)
        try:
            parts = self._traces.fold(batch, now=1, slice=cpu)
        except SliceOver:
            self.too_expensive = True
            self._kept.clear()
            self.spans += len(batch)
            return
        self._seconds -= cpu.used
        for _, folded in parts:
            self.spans += len(batch) - folded.repeated

    @property
    def missing_parents(self) -> int:
        """The number of parents that spans name and that were not added."""
        if not any(map(len, self._parents)):
            return 0
        ids = np.sort(np.concatenate(self._ids))
        parents = _distinct(np.concatenate(self._parents))
        found = ids.take(np.searchsorted(ids, parents), mode="clip") == parents
        return len(parents) - int(np.count_nonzero(found))

    def verdicts(self, *, complete: bool = True) -> list[Verdict]:
        """The verdict of each enabled rule; may be called once. If the trace is not ``complete``,
        only breaches that no further span can undo are reported. Raises :exc:`TrialError` if there
        are no spans, or if it takes too much CPU time."""
        if self.too_expensive:
            raise TrialError(
                "evaluating it takes too much processor time; use fewer or cheaper patterns"
            )
        closed = self._traces.close_due(now=2, idle_ns=0)
        if not closed:
            raise TrialError("it has no span with a valid trace id and span id")
        due = closed[0]
        due.closed = complete
        found, candidates, unsure = decide_or_ask(due, raised_early=False)
        judged = RelationalRules(self._read, seconds=self._seconds).judge(due, candidates)
        broken = {each.rule: each for each in (*found, *(each for each, _ in judged.breaches))}
        judgements = {each.rule: judgement for each, judgement in judged.breaches}
        undecided = {each.rule: each.reason for each in judged.undecided}
        undecided |= {each.rule: TOO_LONG for each in unsure}
        skipped = {rule: incomplete_text(missing) for (_, rule), missing in judged.skipped.items()}
        return [
            replace(
                _verdict(due, k, broken.get(k), judgements.get(k), undecided.get(k)),
                skipped=skipped.get(k),
            )
            for k in range(len(due.rules.rules))
        ]

    def _read(
        self, due: DueTraces, numbers: Sequence[int]
    ) -> Iterator[list[tuple[int, WholeTrace | str]]]:
        trace: tuple[int, int] = tuple(due.rows[0, [HI, LO]].tolist())
        columns = columns_of(scan_bodies("trial", self._kept), [trace])
        yield [(k, WholeTrace(columns, 0)) for k in numbers]


def _distinct(values: Rows) -> Rows:
    """The distinct values, sorted. Not with np.unique or np.setdiff1d, which keep the interpreter's
    lock: for 80 ms with a million values, while all other threads wait."""
    values = np.sort(values)
    first = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def _verdict(
    due: DueTraces,
    rule: int,
    breach: Breach | None,
    judgement: Judgement | None,
    undecided: str | None,
) -> Verdict:
    # A signal also has the counts and evidence if the rule is not broken.
    nominal = Breach(0, rule, NEVER_BROKEN, early=False)
    signal = raise_signal(due, breach or nominal, 0, judgement)
    groups = judgement.groups if judgement is not None else None
    message = None
    if breach is not None:
        syntax = due.rules.rules[rule].syntax
        message = breach_text(syntax, signal.clause, signal.counts, groups)
    return Verdict(
        signal.rule_id,
        breach is not None,
        signal.clause if breach is not None else None,
        signal.counts,
        signal.evidence,
        message,
        groups,
        undecided,
    )
