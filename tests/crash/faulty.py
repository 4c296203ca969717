"""The service with faults that tests switch on: ``python -m tests.crash.faulty serve …``.

A fault is active while a file with its name exists in the directory ``BETRACE_FAULTS``:

- ``full``: the disk is full for the span log and the fallback files;
- ``hang``: calls to the ledger hang;
- ``error``: calls to the ledger fail;
- ``duckdb-error``: writes to DuckDB fail;
- ``slow``: writes to the disk are slow;
- ``fold-error``: spans cannot be folded into their traces.
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
from betrace.service.pipeline.open_traces import OpenTraces
from betrace.service.signals import Signal
from betrace.service.storage.disk import Buffer, Disk
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.traces.slices import CpuSlice

FAULTS = Path(os.environ.pop("BETRACE_FAULTS"))


def injected(fault: str) -> bool:
    return (FAULTS / fault).exists()


def inject() -> None:
    """Replace methods with versions that fail while a fault is active."""
    write_all, record, write = Disk.write_all, SqliteLedger.record, DuckStore.write
    fold = OpenTraces.fold

    def fail_to_write(self: Disk, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        if injected("slow"):
            time.sleep(0.1)
        if injected("full"):
            write_all(self, descriptor, [bytes(buffers[0])[:3]], offset)  # some of it fits
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(self, descriptor, buffers, offset)

    def fail_to_record(self: SqliteLedger, signals: Sequence[Signal]) -> list[bool]:
        while injected("hang"):
            time.sleep(0.1)
        if injected("error"):
            raise LedgerError("injected ledger error", transient=True)
        return record(self, signals)

    def fail_to_insert(self: DuckStore, tenant: str, **rows: Any) -> int:
        if injected("duckdb-error"):
            raise StoreError("injected DuckDB error", transient=True)
        return write(self, tenant, **rows)

    def fail_to_fold(self: OpenTraces, batch: SpanBatch, cpu: CpuSlice) -> None:
        if injected("fold-error"):
            raise TransientError("injected fold error")
        fold(self, batch, cpu)

    OpenTraces.fold = fail_to_fold  # type: ignore[method-assign]
    Disk.write_all = fail_to_write  # type: ignore[method-assign]
    SqliteLedger.record = fail_to_record  # type: ignore[method-assign]
    DuckStore.write = fail_to_insert  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    inject()
    main()
