"""Signals and rows of the trace index as JSON."""

from __future__ import annotations

from typing import Any

from betrace.service.signals import Signal
from betrace.service.storage.duck.queries import StoredSignal, TraceRow
from betrace.service.times import write_time

Json = dict[str, Any]


def signal_json(signal: Signal) -> Json:
    """A signal."""
    return {**signal.to_json(), "detected_at": write_time(signal.detected_at)}


def stored_signal_json(stored: StoredSignal) -> Json:
    """A signal with its status."""
    return {**signal_json(stored.signal), "status": stored.status}


def trace_row_json(row: TraceRow) -> Json:
    """A row of the trace index."""
    return {
        "trace_id": row.trace_id,
        "start": write_time(row.start_ns),
        "end": write_time(row.end_ns),
        "duration_ns": row.end_ns - row.start_ns,
        "spans": row.spans,
        "errors": row.errors,
        "root_name": row.root_name,
        "root_service": row.root_service,
        "services": row.services,
        "partial": row.partial,
    }
