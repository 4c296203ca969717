"""What operators can do with the running service; each action is written to the audit log first."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Protocol

import trio

from betrace.channels import ThreadRunner
from betrace.service.api.backend import AuditError, Operator
from betrace.service.api.cache_control import Caches
from betrace.service.api.params import write_time
from betrace.service.pipeline import breakers
from betrace.service.pipeline.pipeline import Pipeline
from betrace.service.pipeline.recovery.recovery import Recovery
from betrace.service.storage.audit_log import AuditLog
from betrace.service.storage.dead_letters import Letter
from betrace.service.telemetry import events

Json = dict[str, Any]

CHECKPOINT_SECONDS = 30.0
"""How long an operator's checkpoint may wait for the stores."""


class Gate(Protocol):
    """The ingestion edge."""

    @property
    def state(self) -> str:
        """``open``, ``paused`` or ``draining``."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Administration:
    """Implements :class:`betrace.service.api.backend.Administration`."""

    def __init__(
        self,
        pipeline: Pipeline,
        gate: Gate,
        audit: AuditLog,
        threads: ThreadRunner,
        wall_time: Callable[[float], float],
        caches: Caches,
        recovery: Recovery,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._caches = caches
        self._recovery = recovery
        self._pipeline = pipeline
        self._gate = gate
        self._audit = audit
        self._threads = threads
        self._wall_time = wall_time
        self._clock_ns = clock_ns

    # Breakers

    def breakers(self) -> list[Json]:
        return [breakers.shown(each, self._wall_time) for each in self._pipeline.breakers]

    async def act_on_breaker(self, who: Operator, name: str, action: str) -> Json:
        breaker = self._pipeline.breakers[name]
        await self.note(who, f"breaker.{action}", {"breaker": name, "before": str(breaker.state)})
        self._pipeline.breakers.act(name, action)
        for fallback in self._pipeline.fallbacks.values():
            fallback.write_back_now()
        return breakers.shown(breaker, self._wall_time)

    # Dead letters

    async def dead_letters(
        self, stage: str | None, tenant: str | None, limit: int, after: int
    ) -> tuple[list[Json], int | None]:
        found = await self._pipeline.letters.page(stage, tenant, limit + 1, after)
        page = found[:limit]
        return [_letter(each) for each in page], page[-1].id if len(found) > limit else None

    async def dead_letter(self, letter_id: int) -> Json | None:
        found = await self._pipeline.letters.get(letter_id)
        return None if found is None else {**_letter(found[0]), "payload": found[1]}

    async def retry_dead_letters(
        self,
        who: Operator,
        letter_id: int | None,
        stage: str | None,
        tenant: str | None,
    ) -> int:
        target = {"id": letter_id, "stage": stage, "tenant": tenant}
        ids = None if letter_id is None else [letter_id]
        return await self._do(
            who,
            "dead-letters.retry",
            {name: value for name, value in target.items() if value is not None},
            lambda: self._pipeline.letters.retry(ids, stage, tenant),
        )

    async def discard_dead_letter(self, who: Operator, letter_id: int) -> bool:
        found = await self._do(
            who,
            "dead-letters.discard",
            {"id": letter_id},
            lambda: self._pipeline.letters.discard([letter_id]),
        )
        return found > 0

    # Fallback files

    def fallbacks(self) -> list[Json]:
        return [fallback.shown() for fallback in self._pipeline.fallbacks.values()]

    async def write_back_now(self, who: Operator) -> None:
        await self.note(who, "fallback.replay", {})
        for fallback in self._pipeline.fallbacks.values():
            fallback.write_back_now()

    # Checkpoints

    async def checkpoint(self) -> Json:
        return await self._threads.run(self._recovery.shown)

    async def save_checkpoint(self, who: Operator) -> bool | None:
        await self.note(who, "checkpoint.save", {})
        with trio.move_on_after(CHECKPOINT_SECONDS):
            return await self._recovery.save()
        return None

    # Caches

    @property
    def caches(self) -> list[str]:
        return self._caches.names

    async def invalidate_cache(self, who: Operator, name: str, tenant: str | None) -> int:
        whose = {} if tenant is None else {"tenant": tenant}
        await self.note(who, "cache.invalidate", {"cache": name, **whose})
        return self._caches.invalidate(name, tenant)

    async def warm_up_caches(self, who: Operator) -> Json:
        await self.note(who, "cache.warm-up", {})
        return await self._caches.warm_up()

    # The pipeline

    def pipeline(self) -> Json:
        stages = self._pipeline.stages
        waiting = {
            name: size
            for name, queue in self._pipeline.queues.items()
            if (size := queue.send.statistics().size)
        }
        return {
            "ingestion": self._gate.state,
            "drained": not waiting,
            "waiting": waiting,
            "stages": {
                name: "paused" if stage.paused else "working" for name, stage in stages.items()
            },
        }

    async def pause(self, who: Operator) -> Json:
        await self.note(who, "pipeline.pause", {})
        self._gate.pause()
        return self.pipeline()

    async def resume(self, who: Operator) -> Json:
        await self.note(who, "pipeline.resume", {})
        self._gate.resume()
        return self.pipeline()

    async def drain(self, who: Operator, wait_seconds: float) -> Json:
        await self.note(who, "pipeline.drain", {})
        self._gate.pause()
        with trio.move_on_after(wait_seconds):
            for stage in self._pipeline.stages.values():  # in the order of the channels
                await stage.drained()
        return self.pipeline()

    # The audit log

    async def note(self, who: Operator, action: str, target: Json, **more: Any) -> None:
        """Write an action to the audit log, before it is done. Raises :exc:`AuditError`."""
        record = {
            "time": write_time(self._clock_ns()),
            "operator": who.name,
            "client": who.client,
            "action": action,
            **target,
            **more,
        }
        try:
            await self._threads.run(self._audit.append, record)
        except OSError as error:
            raise AuditError(f"the audit log cannot be written ({error})") from error
        shown = " ".join(f"{key}={value}" for key, value in {**target, **more}.items())
        events.OPERATOR(who=who.name, client=who.client, action=action, target=shown)

    async def _do(
        self, who: Operator, action: str, target: Json, act: Callable[[], Awaitable[int]]
    ) -> int:
        """Note an action, and once more if it fails."""
        await self.note(who, action, target)
        try:
            return await act()
        except Exception as error:
            await self.note(who, action, target, failed=str(error))
            raise


def _letter(letter: Letter) -> Json:
    shown = asdict(letter)
    for name in ("first_failed_ns", "last_failed_ns", "next_retry_ns"):
        value = shown.pop(name)
        shown[name.removesuffix("_ns")] = None if value is None else write_time(value)
    return {**shown, "id": str(letter.id)}
