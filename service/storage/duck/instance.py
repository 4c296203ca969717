"""The in-memory DuckDB instance to which the files of tenants are attached."""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from pathlib import Path

import duckdb

from betrace.service.config.stores import DuckDb
from betrace.service.storage.duck.schema import MAX_ROWS, Cursor, StoreError

_CHECKPOINT_SIZE = "64MB"


class Instance:
    """DuckDB within ``limits``. A fatal error ends an instance; :meth:`restart` starts another, of
    the next :attr:`generation`. Thread-safe."""

    def __init__(self, limits: DuckDb, temporary: Path) -> None:
        self._temporary = temporary
        self._settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{limits.memory_bytes}B",
            "threads": limits.threads,
            "temp_directory": str(temporary),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            # A checkpoint rewrites most of a table's index, so make few of them.
            "checkpoint_threshold": _CHECKPOINT_SIZE,
            # Pages of results are read by their sort key first, their other columns afterwards.
            "late_materialization_max_rows": MAX_ROWS,
        }
        self._lock = threading.Lock()
        self.generation = 1
        self._root: Cursor | None = duckdb.connect(":memory:", config=self._settings)

    def cursor(self) -> Cursor:
        """A new connection. Raises :exc:`StoreError` after :meth:`close`."""
        root = self._root
        if root is None:
            raise StoreError("the store is closed", transient=False)
        return root.cursor()

    def restart(self, generation: int) -> None:
        """Replace the instance if it is still the one of this generation."""
        with self._lock:
            if self._root is not None and generation == self.generation:
                self.generation += 1
                old, self._root = self._root, duckdb.connect(":memory:", config=self._settings)
                with suppress(duckdb.Error):
                    old.close()

    def close(self) -> None:
        """End the instance. Idempotent."""
        with self._lock:
            root, self._root = self._root, None
        if root is not None:
            with suppress(duckdb.ResourceInUseException):
                root.close()
            shutil.rmtree(self._temporary, ignore_errors=True)
