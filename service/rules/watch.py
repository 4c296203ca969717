"""Watches the rule files: changes apply while the service runs, and problems are logged once."""

from __future__ import annotations

import trio

from betrace.channels import ThreadRunner
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import ALL_TENANTS
from betrace.service.telemetry import events


class RuleWatch:
    """Reloads the rules of ``registry`` in ``threads``. Methods are called on the Trio thread."""

    def __init__(self, registry: RuleRegistry, threads: ThreadRunner, poll_seconds: float) -> None:
        self._registry = registry
        self._threads = threads
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Report the problems found at the start, then reload every ``poll_seconds``, forever."""
        for problem in self._registry.store.problems.values():
            events.RULES_BROKEN(problem=problem)
        while True:
            await trio.sleep(self._poll_seconds)
            await self.reload()

    async def reload(self) -> None:
        """Reload changed rule files now."""
        store = self._registry.store
        before = store.problems
        changed = await self._threads.run(self._registry.refresh)
        if changed:
            every = ALL_TENANTS in changed
            events.RULES_CHANGED(tenants="all tenants" if every else ", ".join(sorted(changed)))
        problems = store.problems
        for path, problem in problems.items():
            if before.get(path) != problem:
                events.RULES_BROKEN(problem=problem)
        for path in before.keys() - problems.keys():
            events.RULES_MENDED(file=path)
