"""Reports damaged places of the span log."""

from __future__ import annotations

from betrace.service.storage.spanlog.damage import Skipped
from betrace.service.telemetry import events


def report_skipped(found: Skipped) -> None:
    """Log a place of the span log that cannot be read."""
    if found.torn:
        events.LOG_CUT(bytes=found.bytes, tenant=found.tenant)
        return
    events.LOG_DAMAGED(
        tenant=found.tenant,
        bytes=found.bytes,
        offset=found.offset,
        segment=found.segment,
        reason=found.reason,
        lost=found.lost,
    )
