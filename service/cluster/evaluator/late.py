"""The trace index as of the message that a partition applies.

The index may be ahead of a partition that applies its log again after a takeover: it then has spans
and signals of messages that are still to come. Both are left out here, so that late spans are
decided as they were the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from betrace.service.pipeline.history import HistoryUnavailable, TraceIndex
from betrace.service.signals import Kind, Signal
from betrace.service.storage.duck.queries import TraceRow

RaisedRow = tuple[str, str, int, int, str]


class IndexAtMessage:
    """Implements :class:`betrace.service.pipeline.history.TraceIndex`.

    ``upto`` returns the log position of the last message before those that are being folded.
    ``missing`` returns why the index cannot be complete yet, if it cannot.
    """

    def __init__(
        self, index: TraceIndex, upto: Callable[[], int], missing: Callable[[], str | None]
    ) -> None:
        self._index = index
        self._upto = upto
        self._missing = missing
        self._to_come: dict[tuple[str, str], dict[tuple[str, str], set[int]]] = {}

    def expect(self, signals: Iterable[Signal]) -> None:
        """Note signals that the index may have, but that are still to be made."""
        for signal in signals:
            of = self._to_come.setdefault((signal.tenant, signal.trace_id), {})
            of.setdefault((signal.rule_id, signal.rule_version), set()).add(_number(signal))

    def made(self, signals: Iterable[Signal]) -> None:
        """Note that signals were made, so they are no longer to come."""
        for signal in signals if self._to_come else ():
            of = self._to_come.get((signal.tenant, signal.trace_id), {})
            of.get((signal.rule_id, signal.rule_version), set()).discard(_number(signal))

    def clear(self) -> None:
        """Nothing is to come any more."""
        self._to_come.clear()

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        """The traces that the index had by then. Raises
        :exc:`~betrace.service.pipeline.history.HistoryUnavailable`."""
        reason = self._missing()
        if reason is not None:
            raise HistoryUnavailable(reason)
        found = self._index.find_traces(tenant, trace_ids)
        upto = self._upto()
        known = {}
        for trace_id, row in found.items():
            positions = [each for each in row.positions if each <= upto]
            if len(positions) == len(row.positions):
                known[trace_id] = row
            elif positions:  # how many spans it had then is unknown: all that can be read
                known[trace_id] = replace(row, positions=positions, spans=0)
        return known

    def raised_of(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, list[RaisedRow]]:
        """The signals that traces had by then."""
        found = self._index.raised_of(tenant, trace_ids)
        if not self._to_come:
            return found
        return {trace_id: self._by_then(tenant, trace_id, rows) for trace_id, rows in found.items()}

    def _by_then(self, tenant: str, trace_id: str, rows: list[RaisedRow]) -> list[RaisedRow]:
        to_come = self._to_come.get((tenant, trace_id), {})
        known = []
        for rule_id, version, raised, retracted, clause in rows:
            first = min(to_come.get((rule_id, version), ()), default=None)
            if first is not None:  # signals alternate, so all before the first one were made
                raised, retracted = first // 2, (first - 1) // 2
            if raised:
                known.append((rule_id, version, raised, retracted, clause))
        return known


def _number(signal: Signal) -> int:
    """The signal's number among those of its rule and trace, from 1."""
    return 2 * signal.episode + (1 if signal.kind is Kind.RAISED else 2)
