"""Checkpoints of DuckDB files whose unsaved rows take too much memory (see
:mod:`betrace.service.storage.duck.memory`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import duckdb

from betrace.service.storage.duck.instance import Instance
from betrace.service.storage.duck.memory import UnsavedRows, drop_pages
from betrace.service.storage.duck.schema import Cursor, StoreError
from betrace.service.storage.duck.tenant_file import TenantFile

_SAVED_AT_ONCE = 4  # files checkpointed after one write, so that no write waits long
_PAGES_PART = 32  # of the memory: pages of files that are kept after a checkpoint


class Checkpointer:
    """Keeps the unsaved rows of all files below three quarters of ``memory_bytes``. ``clock`` is
    monotonic, in seconds."""

    def __init__(self, instance: Instance, memory_bytes: int, clock: Callable[[], float]) -> None:
        self._instance = instance
        self._memory = memory_bytes
        self._unsaved = UnsavedRows(memory_bytes * 3 // 4, clock)

    def written(self, file: TenantFile, files: Callable[[], Iterable[TenantFile]]) -> None:
        """Call this after a write to ``file``: checkpoint it if its log has long been long, and
        the ones of ``files`` that were written longest ago if all take too much memory."""
        if self._note(file):  # DuckDB made a checkpoint by itself
            with suppress(duckdb.Error, StoreError), self._instance.cursor() as root:
                self._drop_pages(root)
        if self._unsaved.overdue(file.log):
            self._save(file)
        excess = self._unsaved.excess
        if excess <= 0:
            return
        unsaved = [each for each in files() if each.log.bytes]
        for each in sorted(unsaved, key=lambda each: each.last_used)[:_SAVED_AT_ONCE]:
            if excess > 0:
                excess -= each.log.memory
                self._save(each)

    def detached(self, file: TenantFile) -> None:
        """Note that a file no longer takes memory."""
        self._unsaved.note(file.log, 0)

    def _note(self, file: TenantFile) -> bool:
        """Note how large the file's log is; returns whether it shrank."""
        return self._unsaved.note(file.log, file.log_bytes)

    def _save(self, file: TenantFile) -> None:
        """Checkpoint a file, unless it is detached or being written."""
        with file.changed:
            if file.pool is None or file.reserved or not file.writing.acquire(blocking=False):
                return
            file.users += 1
        try:
            with suppress(duckdb.Error, StoreError), self._instance.cursor() as root:
                root.execute(f"CHECKPOINT {file.alias}").fetchall()
                self._drop_pages(root)
            self._note(file)
        finally:
            file.writing.release()
            with file.changed:
                file.users -= 1
                file.changed.notify_all()

    def _drop_pages(self, root: Cursor) -> None:
        drop_pages(root, self._memory // _PAGES_PART, self._memory)
