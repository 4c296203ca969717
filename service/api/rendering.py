"""Signals and rows of the trace index as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from betrace.service.config.edge import Api
from betrace.service.signals import MISSING_PARENTS, MODE, SERVICE, Signal
from betrace.service.storage.duck.queries import StoredSignal, TraceRow
from betrace.service.storage.triage import Acknowledgement, TriageStore
from betrace.service.times import write_time

Json = dict[str, Any]

_FIELDS = (MODE, MISSING_PARENTS, SERVICE)


def signal_json(signal: Signal) -> Json:
    """A signal. What its context says of rule and trace are fields."""
    context = {k: v for k, v in (signal.context or {}).items() if k not in _FIELDS}
    return {
        **signal.to_json(),
        "detected_at": write_time(signal.detected_at),
        "context": context or None,
        MODE: signal.mode,
        MISSING_PARENTS: signal.missing_parents,
        SERVICE: signal.service,
    }


def linked(shown: Json, api: Api) -> Json:
    """A signal with the address of its page as ``url``, if people can reach the pages."""
    url = api.page_url(f"/signals/{shown['id']}", shown["tenant"])
    return shown if url is None else {**shown, "url": url}


def signals_json(
    triage: TriageStore, tenant: str, found: Sequence[StoredSignal], api: Api
) -> list[Json]:
    """A tenant's signals with their status, ``muted``, ``acknowledged`` and ``url``. Blocks."""
    known = triage.acknowledgements(tenant, [stored.signal.id for stored in found])
    shown = []
    for stored in found:
        signal, acknowledged = stored.signal, known.get(stored.signal.id)
        extra = {
            "status": stored.status,
            "muted": triage.muted(tenant, signal.rule_id, signal.detected_at),
            "acknowledged": acknowledged and acknowledgement_json(acknowledged),
        }
        shown.append(linked({**signal_json(signal), **extra}, api))
    return shown


def acknowledgement_json(found: Acknowledgement) -> Json:
    """An acknowledgement of a signal."""
    return {"at": write_time(found.at_ns), "by": found.by, "note": found.note}


def trace_row_json(row: TraceRow) -> Json:
    """A row of the trace index."""
    return {
        "trace_id": row.trace_id,
        "start": write_time(row.start_ns),
        "end": write_time(row.end_ns),
        "duration_ns": max(0, row.end_ns - row.start_ns),
        "spans": row.spans,
        "errors": row.errors,
        "root_name": row.root_name,
        "root_service": row.root_service,
        "services": row.services,
        "partial": row.partial,
    }
