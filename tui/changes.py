"""Changes that an operator makes to the service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

PREFIX = "change_"
"""The names of actions that change something begin with this, such as ``action_change_trip``.
`--read-only` disables them."""


@dataclass(frozen=True, slots=True)
class OperatorChange:
    """One change, for :meth:`betrace.tui.base.BaseApp.change`."""

    title: str
    """The question, such as: Trip the breaker ledger?"""

    verb: str
    """The label of the button: Trip."""

    run: Callable[[], Awaitable[str]]
    """Makes the change and returns its result as a sentence: "ledger is open". Raises
    :exc:`betrace.tui.client.ClientError`."""

    effects: Sequence[tuple[str, str, str]] = ()
    """What changes: (name, old, new)."""

    note: str = ""
    """The consequences, and whether they can be undone."""


async def nothing() -> str:
    """A change that makes none: a question only."""
    return ""
