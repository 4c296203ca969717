"""Tables of what is not in the snapshots: read when they are looked at, and again now and then."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from betrace.tui.client import ClientError, Json
from betrace.tui.state import State
from betrace.tui.widgets.basic import Live, marked, toned
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table import TablePanel

TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MOST = 1000
"""What is read of a list, at most."""

Part = str | tuple[str, str]


class Listing(TablePanel):
    """A table with a line above it. A subclass gives ``rows``, ``read`` and ``head``."""

    RELOAD = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        """Why it could not be read, the last time."""

    def above(self) -> ComposeResult:
        yield Live(classes="head")

    def head(self) -> Sequence[Part]:
        """What stands above the table."""
        return ()

    @abstractmethod
    async def read(self) -> None:
        """Read what is shown, and keep it. Raises :exc:`betrace.tui.client.ClientError`."""

    async def load(self) -> None:
        try:
            await self.read()
            self.problem = ""
        except ClientError as error:
            self.problem = str(error)
            raise
        finally:
            if self.betrace.frozen_at is None:
                self.show(self.betrace.state)

    def show(self, state: State) -> None:
        super().show(state)
        parts = list(self.head())
        if self.problem:
            parts = [marked(f"not read: {self.problem}", "bad"), "  ", *parts]
        self.query_one(".head", Live).text(*parts)


class TenantListing(Listing):
    """A listing of what is one tenant's, with a key to look at another's."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "tenant", "Of tenant", tooltip="Look at another tenant's"),
    ]

    async def load(self) -> None:
        """An operator's token is no tenant's: there is nothing to read before one is chosen."""
        try:
            await super().load()
        except ClientError as error:
            if self.betrace.client.tenant is None and error.status in (401, 403):
                self.problem = "whose? press o to choose a tenant"
                self.show(self.betrace.state)
                return
            raise

    @property
    def whose(self) -> Part:
        return toned(f"tenant {self.betrace.client.tenant or 'default'}", "good")

    def action_tenant(self) -> None:
        async def ask() -> None:
            try:
                names = await tenant_names(self)
            except ClientError:  # who is no operator may still name one
                names = []
            options = [(name, name) for name in names]
            chosen = await self.betrace.push_screen_wait(
                Pick("Look at which tenant's signals and rules?", options, check_tenant)
            )
            if chosen is not None:
                self.betrace.view_tenant(chosen)

        self.betrace.start(ask, "ask")


async def tenant_names(panel: TablePanel) -> list[str]:
    answer = await panel.betrace.client.get("/api/admin/tenants", limit=MOST)
    return [str(each.get("name")) for each in objects(answer.get("tenants"))]


def check_tenant(text: str) -> str:
    """What keeps a text from being a tenant's name."""
    if TENANT.fullmatch(text):
        return ""
    return "a tenant's name has 1 to 63 of a-z, 0-9, - and _, and begins with a letter or digit"


def objects(value: object) -> list[Json]:
    """The objects of a list, in an answer that may not be as it should."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}
