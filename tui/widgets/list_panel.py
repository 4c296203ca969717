"""Tables of data that is not in the snapshots: read when visible, and again periodically."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from betrace.tui.base import ViewTenant
from betrace.tui.client import ClientError
from betrace.tui.json_values import objects
from betrace.tui.state import ServiceState
from betrace.tui.tones import marked, toned
from betrace.tui.widgets.live_text import LiveText
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table_panel import TablePanel

TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MOST = 1000
"""Maximum number of entries read from a list."""

Part = str | tuple[str, str]


class ListPanel(TablePanel):
    """A table with a line above it. A subclass implements ``rows``, ``read`` and ``head``."""

    RELOAD = 5.0

    def __init__(self) -> None:
        super().__init__()
        self._loaded = False
        self.problem = ""
        """Why the last read failed; empty if it did not."""

    def above(self) -> ComposeResult:
        yield LiveText(classes="head")

    def head(self) -> Sequence[Part]:
        """The line above the table."""
        return ()

    @abstractmethod
    async def read(self) -> None:
        """Read the entries. Raises :exc:`betrace.tui.client.ClientError`."""

    async def load(self) -> None:
        try:
            await self.read()
            self.problem, self._loaded = "", True
        except ClientError as error:
            self.problem = str(error)
            raise
        finally:
            if self.betrace.frozen_at is None:
                self.show(self.betrace.state)

    def empty_text(self) -> str:
        """Says that there is nothing only if that is known."""
        if self._loaded or self.filter_text or self.betrace.state.stale:
            return super().empty_text()
        return "Not loaded." if self.problem else "Loading …"

    def show(self, state: ServiceState) -> None:
        super().show(state)
        parts = list(self.head())
        if self.problem:
            parts = [marked(f"not loaded: {self.problem}", "bad"), "  ", *parts]
        self.query_one(".head", LiveText).text(*parts)


class TenantListPanel(ListPanel):
    """A list that belongs to one tenant, with a key to choose another."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "tenant", "Tenant", show=False, tooltip="Show another tenant"),
    ]

    async def load(self) -> None:
        """With an operator's token, which belongs to no tenant, ask for a tenant first."""
        try:
            await super().load()
        except ClientError as error:
            if self.betrace.client.tenant is None and error.status in (401, 403):
                self.problem = "no tenant chosen; press o"
                self.show(self.betrace.state)
                return
            raise

    @property
    def tenant_label(self) -> Part:
        return toned(f"tenant {self.betrace.client.tenant or 'default'}", "good")

    def action_tenant(self) -> None:
        async def ask() -> None:
            try:
                names = await tenant_names(self)
            except ClientError:  # without an operator's token the user can still type a name
                names = []
            options = [(name, name) for name in names]
            chosen = await self.betrace.push_screen_wait(
                Pick("Show signals and rules of which tenant?", options, check_tenant)
            )
            if chosen is not None:
                self.betrace.post_message(ViewTenant(chosen))

        self.betrace.start(ask, "ask")


async def tenant_names(panel: TablePanel) -> list[str]:
    answer = await panel.betrace.client.get("/api/admin/tenants", limit=MOST)
    return [str(each.get("name")) for each in objects(answer.get("tenants"))]


def check_tenant(text: str) -> str:
    """What is wrong with a tenant's name, or an empty string."""
    if TENANT.fullmatch(text):
        return ""
    return "use 1 to 63 of a-z, 0-9, - and _, beginning with a letter or digit"
