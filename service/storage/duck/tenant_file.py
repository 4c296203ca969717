"""The state of one tenant's DuckDB file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from betrace.service.storage.duck.memory import LogSize
from betrace.service.storage.duck.pool import Pool, PoolTimeout
from betrace.service.storage.duck.schema import FILE, Cursor
from betrace.service.storage.duck.write import Known


@dataclass(slots=True, eq=False)
class TenantFile:
    """A tenant's file. ``changed`` guards the fields without another guard."""

    tenant: str
    path: Path
    log: LogSize
    changed: threading.Condition = field(default_factory=threading.Condition)
    writing: threading.Lock = field(default_factory=threading.Lock)
    pool: Pool[Cursor] | None = None
    """Connections; None while the file is not attached."""
    generation: int = 0
    """Of the instance to which it is attached."""
    inode: int = 0
    users: int = 0
    reserved: bool = False
    """Being deleted or recreated; new users wait."""
    deleted: bool = False
    last_used: float = 0.0
    known: Known | None = None
    """What is known of its rows; guarded by ``writing``."""

    @property
    def alias(self) -> str:
        """The database's quoted name; the prefix avoids DuckDB's own names."""
        return f'"t_{self.tenant}"'

    @property
    def log_bytes(self) -> int:
        """The size of its write-ahead log."""
        try:
            return self.path.with_name(FILE + ".wal").stat().st_size
        except FileNotFoundError:
            return 0

    @contextmanager
    def write_turn(self, timeout: float) -> Iterator[None]:
        """Be the only writer. Raises :exc:`PoolTimeout` if that takes longer than ``timeout``."""
        if not self.writing.acquire(timeout=timeout):
            raise PoolTimeout(
                f"tenant {self.tenant}: another write took more than {timeout:g} s; try again"
            )
        try:
            yield
        finally:
            self.writing.release()

    def forget_known(self) -> None:
        """Have the next writer read the existing rows again."""
        known, self.known = self.known, None
        if known is not None:
            known.clear()
