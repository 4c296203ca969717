"""Signals that were stored before a crash and that the traces read back know nothing of.

A trace may have been closed, and its breach stored, after the last checkpoint. After a restart
it is open again and closes with all the spans that came meanwhile; what was raised and does not
hold any more must be retracted, as for a trace that was reopened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from service.signals import Kind, Signal
from service.traces.due import DueTraces

Raised = tuple[str, str, str]
"""A rule's id, its version, and the clause that was broken."""


class RaisedBefore:
    """By tenant and trace, which signals stand. Not thread-safe: one thread at a time."""

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, frozenset[Raised]]] = {}

    def __len__(self) -> int:
        return sum(len(traces) for traces in self._tenants.values())

    def note(self, signals: Iterable[Signal]) -> None:
        """Take stored signals into account, a raised one before its retraction. What was raised
        early is left out: no later span can undo it."""
        for signal in signals:
            traces = self._tenants.setdefault(signal.tenant, {})
            stands = traces.get(signal.trace_id, frozenset())
            rule = (signal.rule_id, signal.rule_version)
            if signal.kind is Kind.RETRACTED:
                traces[signal.trace_id] = frozenset(each for each in stands if each[:2] != rule)
            elif not signal.early:
                traces[signal.trace_id] = stands | {(*rule, signal.clause)}

    def attach(self, due: DueTraces) -> None:
        """Tell traces that were closed what stands of them; they know it themselves from now on."""
        traces = self._tenants.get(due.tenant)
        if not traces:
            return
        for k in range(len(due)):
            stands = traces.pop(due.trace_id(k), None)
            if stands:
                due.raised[k] = stands

    def keep(self, wanted: Callable[[str, str], bool]) -> None:
        """Forget all but ``wanted(tenant, trace id)``."""
        for tenant, traces in list(self._tenants.items()):
            kept = {t: stands for t, stands in traces.items() if stands and wanted(tenant, t)}
            if kept:
                self._tenants[tenant] = kept
            else:
                del self._tenants[tenant]

    def forget(self, tenant: str) -> None:
        """Forget a tenant."""
        self._tenants.pop(tenant, None)

    def saved(self) -> dict[str, dict[str, list[list[str]]]]:
        """All of it as JSON."""
        return {
            tenant: {t: [list(each) for each in sorted(stands)] for t, stands in traces.items()}
            for tenant, traces in self._tenants.items()
        }

    def restore(self, saved: dict[str, dict[str, list[list[str]]]]) -> None:
        """Become what :meth:`saved` gave."""
        self._tenants = {
            tenant: {
                trace: frozenset((rule, version, clause) for rule, version, clause in stands)
                for trace, stands in traces.items()
            }
            for tenant, traces in saved.items()
        }
