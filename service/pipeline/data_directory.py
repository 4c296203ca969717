"""Notices that the data directory was deleted or replaced while the service runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from betrace.service.telemetry import events

CHECK_SECONDS = 0.5


class DataDirectory:
    """Checks that ``path`` is still the directory it was at the start.

    If it is not, open files still accept writes but are lost when they are closed. ``refuse`` is
    then called with a message, and ``accept`` when the directory is back.
    """

    def __init__(
        self, path: Path, refuse: Callable[[str], object], accept: Callable[[], object]
    ) -> None:
        self._path = path
        self._refuse = refuse
        self._accept = accept
        self._identity = _identity(path)
        self.gone = False
        """Whether the directory is missing, or is another one."""

    async def run(self) -> None:
        """Check twice a second, forever. Looking up a directory does not wait for a disk."""
        while True:
            self.check()
            await trio.sleep(CHECK_SECONDS)

    def check(self) -> None:
        """Check now."""
        gone = _identity(self._path) != self._identity
        if gone == self.gone:
            return
        self.gone = gone
        if gone:
            events.DATA_GONE(path=self._path)
            self._refuse(
                "the data directory of the service was deleted or replaced, so spans cannot be "
                "kept; send them again when an operator has restarted it"
            )
        else:
            events.DATA_BACK(path=self._path)
            self._accept()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
