"""Ending the parts of a program in order, within a time of grace, and saying what it waits for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One part to end."""

    name: str
    """What to call it in the log."""

    stop: Callable[[], object]
    """Tells it to end and returns at once; the close of its channel's sender, say."""

    finished: Callable[[], Awaitable[object]]
    """Waits until it has ended; the `Stage.drained` of the stage behind that channel, say."""


async def shut_down(steps: Sequence[Step], grace: float, *, report_every: float = 5.0) -> list[str]:
    """End the parts one after the other, and return the names of those that did not end.

    A part is told to stop when those before it have ended. When the time is up, the parts that
    remain are still told to stop, but not waited for. A part that raises is logged and counts as
    not ended.

    Args:
      steps: the parts in the order in which work passes through them.
      grace: seconds for all of them together.
      report_every: seconds between two lines in the log that say which parts remain.
    """
    unfinished = [step.name for step in steps]
    deadline = trio.current_time() + grace

    async def report() -> None:
        while True:
            await trio.sleep(report_every)
            logger.info("shutting down; waiting for %s", ", ".join(unfinished))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        for step in steps:
            try:
                step.stop()
                with trio.move_on_at(deadline):
                    await step.finished()
                    unfinished.remove(step.name)
            except Exception:  # the other parts must end all the same
                logger.exception("shutting down: %s failed", step.name)
        nursery.cancel_scope.cancel()
    if unfinished:
        logger.warning("shutting down; not finished: %s", ", ".join(unfinished))
    return unfinished
