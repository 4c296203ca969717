"""Audit logs: one JSON object per line for each action, appended and synced."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import orjson

from betrace.service.durable import sync_directory


class AuditLog:
    """The file ``path``. At ``max_bytes`` it is renamed to ``<name>.1``, older files to ``.2`` and
    so on; ``files`` of them are kept. Methods block and may be called from any thread; they raise
    :exc:`OSError`."""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._lock = threading.Lock()
        self.records = 0
        """Records written since the start."""

    def append(self, *records: dict[str, Any]) -> None:
        """Append records; they are durable when this returns."""
        lines = [orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records]
        data = b"".join(lines)
        with self._lock:
            if self._size() + len(data) > self._max_bytes:
                self._rotate()
            with self._path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.records += len(records)

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def _rotate(self) -> None:
        for number in range(self._files, 0, -1):
            older = self._numbered(number - 1) if number > 1 else self._path
            if older.exists():
                older.replace(self._numbered(number))
        sync_directory(self._path.parent)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
