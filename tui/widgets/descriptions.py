"""Descriptions of rows that need data of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

from betrace.tui.client import ApiClient
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.table_panel import TablePanel

MOST = 20
"""Descriptions kept."""
SETTLED = 0.15
"""Seconds that the cursor rests on a row before its data is read."""


class Loadable(Protocol):
    async def load(self, client: ApiClient) -> None:
        """Read the data. Keeps an error for display instead of raising it."""


T = TypeVar("T", bound=Loadable)


class Descriptions(Generic[T]):
    """The descriptions shown last, each read once the cursor has rested on its row.

    Args:
      make: makes the description of a row without data; None when the row is gone.
    """

    def __init__(self, panel: TablePanel, make: Callable[[str], T | None]) -> None:
        self._panel = panel
        self._make = make
        self._kept: dict[str, T] = {}

    def get(self, key: str) -> T | None:
        """The description of a row, whose data may come later."""
        found = self._kept.get(key)
        if found is None:
            found = self._make(key)
            if found is not None:
                self._kept[key] = found
                while len(self._kept) > MOST:
                    del self._kept[next(iter(self._kept))]
                self._panel.betrace.start(partial(self._load, key, found), "detail")
        return found

    def forget(self, key: str) -> None:
        """Read the data again the next time."""
        self._kept.pop(key, None)

    async def _load(self, key: str, found: T) -> None:
        panel = self._panel
        try:
            await asyncio.sleep(SETTLED)
            await found.load(panel.betrace.client)
        except asyncio.CancelledError:  # the cursor moved on
            self.forget(key)
            raise
        if panel.app.is_running:
            panel.show_side(panel.betrace.state)
            if isinstance(panel.app.screen, Detail):
                panel.app.screen.show(panel.betrace.state)
