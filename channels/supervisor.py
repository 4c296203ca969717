"""Restarts a function that crashed, with a growing pause."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

logger = logging.getLogger("channels.supervisor")


def backoff(failures: int, first: float, longest: float) -> float:
    """Return the pause in seconds after this many consecutive failures: ``first``, doubled for each
    further one, up to ``longest``."""
    # The exponent is bounded so that a thousand failures don't overflow a float.
    return float(min(longest, first * 2 ** min(failures - 1, 60)))


async def supervise(
    fn: Callable[[], Awaitable[object]],
    name: str,
    *,
    first_pause: float = 0.1,
    longest_pause: float = 5.0,
    on_crash: Callable[[Exception], None] | None = None,
) -> None:
    """Run ``fn`` until it returns; when it raises an Exception, log it, pause, and run it again.

    Pauses double from ``first_pause`` to ``longest_pause`` seconds over consecutive crashes. A run
    that lasted longer than the pause before it counts as healthy and resets the pause, so that a
    rare crash costs little and a constant one does not spin. Cancellation passes through.

    Args:
      fn: an async function without arguments.
      name: for the log.
      on_crash: called with each exception, before the pause; must not raise.
    """
    failures = 0
    pause = 0.0
    while True:
        started = trio.current_time()
        try:
            await fn()
        except Exception as error:
            if trio.current_time() - started > pause:
                failures = 0
            failures += 1
            pause = backoff(failures, first_pause, longest_pause)
            logger.exception("%s crashed; restarting it in %.1f s", name, pause)
            if on_crash is not None:
                on_crash(error)
            await trio.sleep(pause)
        else:
            return
