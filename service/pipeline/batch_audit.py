"""A record of each accepted request, on a side tap, so that it never delays requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from betrace.channels import Tap, ThreadRunner
from betrace.service.pipeline.request import Done, Request
from betrace.service.storage.audit_log import AuditLog
from betrace.service.storage.spanlog.frames import unpack_position

CAPACITY = 10_000
_WRITTEN_AT_ONCE = 1000


class BatchAudit:
    """Writes ``batches.jsonl``; methods are called on the Trio thread. Records that do not fit
    while the disk is slow are dropped, and counted in the tap's statistics."""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._file = AuditLog(path, max_bytes, files)
        self._threads = ThreadRunner("audit", 1)
        self.tap: Tap[dict[str, Any]] = Tap(
            "audit", CAPACITY, self._write, max_batch_weight=_WRITTEN_AT_ONCE
        )

    def accepted(self, request: Request, outcome: Done) -> None:
        """Record a request. ``segment`` and ``offset`` are its place in the tenant's log, null for
        a request without spans, of which nothing is written, and on an edge of a cluster."""
        segment, offset = unpack_position(outcome.position) if outcome.position else (None, None)
        self.tap.offer(
            {
                "received_ns": request.received_ns,
                "tenant": request.tenant,
                "spans": outcome.spans,
                "rejected": outcome.rejected,
                "bytes": len(request.body),
                "segment": segment,
                "offset": offset,
            }
        )

    async def _write(self, records: list[dict[str, Any]]) -> None:
        await self._threads.run(self._append, records)

    def _append(self, records: list[dict[str, Any]]) -> None:
        self._file.append(*records)

    def dropped(self) -> int:
        """Requests that were not recorded."""
        return sum(self.tap.statistics().dropped.values())

    async def run(self) -> None:
        """Write records until :meth:`close`."""
        await self.tap.run()

    def close(self) -> None:
        """Write the remaining records, then end."""
        self.tap.close()

    def close_threads(self) -> None:
        """End the thread."""
        self._threads.close()
