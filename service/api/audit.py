"""The audit log of operators: every action is written to it before it is done."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from betrace.channels import ThreadRunner
from betrace.service.storage.audit_log import AuditLog
from betrace.service.telemetry import events
from betrace.service.times import write_time

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Operator:
    """Who acts: a name, which anyone with the operator token may choose, and an address."""

    name: str
    client: str


class AuditError(Exception):
    """An action was not done because it could not be written to the audit log."""


class AuditTrail:
    """Writes actions to ``log``, in a thread of ``threads``."""

    def __init__(
        self, log: AuditLog, threads: ThreadRunner, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._log = log
        self._threads = threads
        self._clock_ns = clock_ns

    async def note(self, who: Operator, action: str, target: dict[str, Any], **more: Any) -> None:
        """Write an action; it is durable when this returns. Raises :exc:`AuditError`."""
        record = {
            "time": write_time(self._clock_ns()),
            "operator": who.name,
            "client": who.client,
            "action": action,
            **target,
            **more,
        }
        try:
            await self._threads.run(self._log.append, record)
        except OSError as error:
            raise AuditError(f"the audit log cannot be written ({error})") from error
        shown = " ".join(f"{key}={value}" for key, value in {**target, **more}.items())
        events.OPERATOR(who=who.name, client=who.client, action=action, target=shown)

    async def do(
        self, who: Operator, action: str, target: dict[str, Any], act: Callable[[], Awaitable[R]]
    ) -> R:
        """Write an action and do it; if it fails, write that too."""
        await self.note(who, action, target)
        try:
            return await act()
        except Exception as error:
            await self.note(who, action, target, failed=str(error))
            raise
