"""A circuit breaker: refuses calls to a failing dependency until trial calls show that it works.

The states and rules are those of resilience4j's CircuitBreaker with a count-based sliding window
(https://resilience4j.readme.io/docs/circuitbreaker)::

    breaker = Breaker("ledger", BreakerOptions(minimum_calls=50, open_for=15.0, timeout=5.0))
    try:
        await breaker.call(ledger.write, batch)
    except BreakerOpen as refused:          # not called; try again in refused.retry_in seconds
        ...

- **closed**: calls go through. When the window contains the minimum number of calls and its rate of
  failed or slow calls reaches the threshold, the breaker opens.
- **open**: calls are refused. The first call after ``open_for`` seconds makes it half-open.
- **half_open**: a fixed number of trial calls go through, others are refused. When all trials have
  returned, their rates alone decide between closed and open.
- **forced_open**: all calls are refused until an operator changes the state.
- **disabled**: all calls go through and none is judged until an operator changes the state.

A call that is cancelled from outside, or ends with a BaseException that is not an Exception, is
neither a success nor a failure and returns its permit. The result of a call that began before a
transition does not count after it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple, final

import trio

from betrace.channels.breaker_options import (
    BreakerOptions,
    BreakerSnapshot,
    BreakerState,
    Transition,
)
from betrace.channels.errors import TransientError

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

logger = logging.getLogger("channels.breaker")

KEPT_TRANSITIONS = 20
"""The number of transitions that a breaker remembers."""


class BreakerOpen(TransientError):  # noqa: N818 (the name of a state, like trio's own)
    """The breaker refused a call; it was not made."""

    def __init__(self, name: str, state: BreakerState, retry_in: float) -> None:
        super().__init__(f"circuit breaker {name} is {state}")
        self.name = name
        """The breaker's name."""
        self.state = state
        """The breaker's state at that time."""
        self.retry_in = retry_in
        """Seconds until a call may be permitted; infinite if forced open by an operator."""


class BreakerTimeout(TransientError):  # noqa: N818
    """A call took longer than the breaker allows; it was cancelled and counts as a failure."""


class _Window:
    """The outcomes of the last calls, with counts."""

    def __init__(self, size: int) -> None:
        self.outcomes: deque[tuple[bool, bool]] = deque(maxlen=size)  # failed, slow
        self.failed = 0
        self.slow = 0

    def add(self, failed: bool, slow: bool) -> None:
        if len(self.outcomes) == self.outcomes.maxlen:
            old_failed, old_slow = self.outcomes[0]
            self.failed -= old_failed
            self.slow -= old_slow
        self.outcomes.append((failed, slow))
        self.failed += failed
        self.slow += slow


@final
class Breaker:
    """A circuit breaker around the calls to one dependency. See the module's description.

    Args:
      name: for messages and statistics.
      settings: when it opens and closes.
      is_failure: returns whether an exception raised by a call means that the dependency failed;
        by default every exception does. Other exceptions count as success, because the dependency
        answered.
      on_transition: observer called after each transition. If it raises, that is logged.
    """

    def __init__(
        self,
        name: str,
        settings: BreakerOptions | None = None,
        *,
        is_failure: Callable[[Exception], bool] = lambda error: True,
        on_transition: Callable[[Transition], None] | None = None,
    ) -> None:
        self.name = name
        self.settings = settings or BreakerOptions()
        self._is_failure = is_failure
        self._on_transition = on_transition
        self._state = BreakerState.CLOSED
        self._since: float | None = None
        self._generation = 0
        self._window = _Window(self.settings.window)
        self._trials_left = 0
        self._running = self._permitted = self._not_permitted = 0
        self._succeeded = self._failed = self._timed_out = self._slow = self._cancelled = 0
        self._transitions: deque[Transition] = deque(maxlen=KEPT_TRANSITIONS)

    @property
    def state(self) -> BreakerState:
        """The state; it is ``open`` until the first call after the wait."""
        return self._state

    async def call(self, fn: Callable[[*Ts], Awaitable[R]], *args: *Ts) -> R:
        """Return ``await fn(*args)`` if a call is permitted.

        Raises:
          BreakerOpen: no call is permitted.
          BreakerTimeout: the call took longer than ``settings.timeout``, and was cancelled.
          BaseException: what ``fn`` raised.
        """
        generation = self._acquire()
        started = trio.current_time()
        self._running += 1
        try:
            with trio.move_on_after(self.settings.timeout) as scope:
                result = await fn(*args)
            if scope.cancelled_caught:
                self._timed_out += 1
                raise BreakerTimeout(
                    f"circuit breaker {self.name}: no answer in {self.settings.timeout:g} s"
                )
        except Exception as error:
            self._record(generation, started, scope.cancelled_caught or self._judge(error))
            raise
        except BaseException:
            self._cancelled += 1
            if generation == self._generation and self._state is BreakerState.HALF_OPEN:
                self._trials_left += 1
            raise
        finally:
            self._running -= 1
        self._record(generation, started, False)
        return result

    def trip(self, reason: str = "tripped by an operator") -> None:
        """Open the breaker as the failure rate would; trials follow after ``open_for`` seconds."""
        self._enter(BreakerState.OPEN, reason)

    def reset(self, reason: str = "reset by an operator") -> None:
        """Close the breaker with an empty window, whatever its state."""
        self._enter(BreakerState.CLOSED, reason)

    def force_open(self, reason: str = "forced open by an operator") -> None:
        """Refuse all calls until `reset`, `trip` or `disable`."""
        self._enter(BreakerState.FORCED_OPEN, reason)

    def disable(self, reason: str = "disabled by an operator") -> None:
        """Permit all calls and judge none, until `reset`, `trip` or `force_open`."""
        self._enter(BreakerState.DISABLED, reason)

    def snapshot(self) -> BreakerSnapshot:
        """Return the state, the rates and the counts."""
        calls = len(self._window.outcomes)
        rated = calls >= self._enough_calls()
        return BreakerSnapshot(
            name=self.name,
            state=self._state,
            since=self._since,
            failure_rate=self._window.failed / calls if rated else None,
            slow_rate=self._window.slow / calls if rated else None,
            window_calls=calls,
            trials_left=self._trials_left,
            retry_in=self._retry_in(),
            running=self._running,
            permitted=self._permitted,
            not_permitted=self._not_permitted,
            succeeded=self._succeeded,
            failed=self._failed,
            timed_out=self._timed_out,
            slow=self._slow,
            cancelled=self._cancelled,
            transitions=tuple(self._transitions),
        )

    def _acquire(self) -> int:
        """Take a permit and return the generation that its result belongs to."""
        if self._state is BreakerState.OPEN and self._retry_in() == 0:
            self._enter(
                BreakerState.HALF_OPEN, f"open for {self.settings.open_for:g} s; trial calls begin"
            )
        refuse = self._state in (BreakerState.OPEN, BreakerState.FORCED_OPEN)
        if self._state is BreakerState.HALF_OPEN:
            refuse = self._trials_left == 0
            self._trials_left -= not refuse
        if refuse:
            self._not_permitted += 1
            raise BreakerOpen(self.name, self._state, self._retry_in())
        self._permitted += 1
        return self._generation

    def _judge(self, error: Exception) -> bool:
        try:
            return self._is_failure(error)
        except Exception:  # the permit must be returned in any case
            logger.exception("circuit breaker %s: is_failure failed", self.name)
            return True

    def _retry_in(self) -> float:
        if self._state is BreakerState.FORCED_OPEN:
            return math.inf
        if self._state is BreakerState.OPEN:
            assert self._since is not None
            return max(0.0, self._since + self.settings.open_for - trio.current_time())
        if self._state is BreakerState.HALF_OPEN and self._trials_left == 0:
            # The running trials decide when they return.
            return min(self.settings.timeout, self.settings.open_for)
        return 0.0

    def _enough_calls(self) -> int:
        if self._state is BreakerState.HALF_OPEN:
            return self.settings.trial_calls
        return self.settings.minimum_calls

    def _record(self, generation: int, started: float, failed: bool) -> None:
        seconds = trio.current_time() - started
        slow = seconds > self.settings.slow_after
        self._failed += failed
        self._succeeded += not failed
        self._slow += slow
        if generation != self._generation or self._state is BreakerState.DISABLED:
            return
        self._window.add(failed, slow)
        calls = len(self._window.outcomes)
        if calls < self._enough_calls():
            return
        reasons = [
            f"{count} of {calls} calls {verb} ({count / calls:.0%}, threshold {threshold:.0%})"
            for count, verb, threshold in (
                (self._window.failed, "failed", self.settings.failure_rate),
                (self._window.slow, "were slow", self.settings.slow_rate),
            )
            if count / calls >= threshold
        ]
        if reasons:
            self._enter(BreakerState.OPEN, " and ".join(reasons))
        elif self._state is BreakerState.HALF_OPEN:
            self._enter(BreakerState.CLOSED, f"{self._window.failed} of {calls} trial calls failed")

    def _enter(self, state: BreakerState, reason: str) -> None:
        half_open = state is BreakerState.HALF_OPEN
        transition = Transition(trio.current_time(), self._state, state, reason)
        self._state = state
        self._since = transition.at
        self._generation += 1
        self._window = _Window(self.settings.trial_calls if half_open else self.settings.window)
        self._trials_left = self.settings.trial_calls if half_open else 0
        self._transitions.append(transition)
        if self._on_transition is not None:
            try:
                self._on_transition(transition)
            except Exception:  # a call's outcome must not depend on its observer
                logger.exception("circuit breaker %s: the observer failed", self.name)
