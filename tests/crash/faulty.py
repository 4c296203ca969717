"""The service with faults that the test switches on: ``python -m tests.crash.faulty serve …``.

While a file of that name is in the directory ``BETRACE_FAULTS``:

- ``full``: the span log and the fallback files find the disk full;
- ``hang``: the ledger does not come back from a call;
- ``error``: the ledger refuses;
- ``duckdb-error``: DuckDB refuses;
- ``slow``: a write to the disk takes long;
- ``fold-error``: spans cannot be taken into their traces.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from betrace.channels import TransientError
from betrace.service.cli.main import main
from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.stages.correlate import CorrelateStage
from betrace.service.signals import Signal
from betrace.service.storage.disk import Buffer, Disk
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.traces.slices import CpuSlice

FAULTS = Path(os.environ.pop("BETRACE_FAULTS"))


def there(fault: str) -> bool:
    return (FAULTS / fault).exists()


def inject() -> None:
    """Let the stores fail when a test wants it."""
    write_all, record, write = Disk.write_all, SqliteLedger.record, DuckStore.write
    fold = CorrelateStage._fold_one

    def fail_to_write(self: Disk, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        if there("slow"):
            time.sleep(0.1)
        if there("full"):
            write_all(self, descriptor, [bytes(buffers[0])[:3]], offset)  # some of it fits
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(self, descriptor, buffers, offset)

    def fail_to_record(self: SqliteLedger, signals: Sequence[Signal]) -> list[bool]:
        while there("hang"):
            time.sleep(0.1)
        if there("error"):
            raise LedgerError("the ledger is away, says the test", transient=True)
        return record(self, signals)

    def fail_to_insert(self: DuckStore, tenant: str, **rows: Any) -> int:
        if there("duckdb-error"):
            raise StoreError("DuckDB is away, says the test", transient=True)
        return write(self, tenant, **rows)

    def fail_to_fold(self: CorrelateStage, batch: SpanBatch, cpu: CpuSlice) -> None:
        if there("fold-error"):
            raise TransientError("these spans do not fold, says the test")
        fold(self, batch, cpu)

    CorrelateStage._fold_one = fail_to_fold  # type: ignore[method-assign]
    Disk.write_all = fail_to_write  # type: ignore[method-assign]
    SqliteLedger.record = fail_to_record  # type: ignore[method-assign]
    DuckStore.write = fail_to_insert  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    inject()
    main()
