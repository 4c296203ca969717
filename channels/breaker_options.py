"""What a circuit breaker is given, and what it reports; see `Breaker`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """What a breaker does with calls; see the description of `betrace.channels.breaker`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerOptions:
    """When a breaker opens and closes.

    Raises:
      ValueError: a setting cannot work, or two contradict each other.
    """

    window: int = 100
    """The number of most recent calls that the rates are computed from."""

    minimum_calls: int = 100
    """The minimum number of calls in the window for a rate; at most ``window``."""

    failure_rate: float = 0.5
    """The breaker opens when at least this fraction of the calls failed; over 0, at most 1."""

    slow_rate: float = 1.0
    """The breaker opens when at least this fraction of the calls was slow, failed or not."""

    slow_after: float = math.inf
    """Seconds above which a call is slow."""

    open_for: float = 30.0
    """Seconds to refuse calls before trial calls."""

    trial_calls: int = 10
    """The number of calls permitted while half-open."""

    timeout: float = math.inf
    """Seconds that one call may take."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.trial_calls < 1:
            raise ValueError(
                f"window ({self.window}) and trial_calls ({self.trial_calls}) must be 1 or more"
            )
        if not 1 <= self.minimum_calls <= self.window:
            raise ValueError(
                f"minimum_calls ({self.minimum_calls}) must be between 1 and window "
                f"({self.window}), or the breaker could never open"
            )
        for name in ("failure_rate", "slow_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be over 0 and at most 1")
        for name in ("slow_after", "open_for", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be over 0 seconds")


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of a breaker's state."""

    at: float
    """`trio.current_time` at the change."""

    before: BreakerState
    """The previous state."""

    after: BreakerState
    """The new state; the same as ``before`` if an operator restarted it."""

    reason: str
    """The reason as text."""


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """A breaker at one moment. Counts of calls are since its creation."""

    name: str
    """The breaker's name."""

    state: BreakerState
    """The state. It is ``open`` until the first call after the wait, with ``retry_in`` at 0."""

    since: float | None
    """`trio.current_time` when the state began; None for the initial state."""

    failure_rate: float | None
    """The fraction of failed calls in the window; None below the minimum number of calls."""

    slow_rate: float | None
    """The fraction of slow calls; None below the minimum number of calls."""

    window_calls: int
    """The number of calls in the window; while half-open, of trial calls that returned."""

    trials_left: int
    """While half-open, the number of further trial calls permitted; otherwise 0."""

    retry_in: float
    """Seconds until a call may be permitted: 0 if one is permitted now, infinite if forced open.
    While trials are running, the time by which they should have returned."""

    running: int
    """Running calls."""

    permitted: int
    """Calls made."""

    not_permitted: int
    """Calls refused."""

    succeeded: int
    """Calls that returned, or raised an exception that is not a failure."""

    failed: int
    """Calls that failed, including those that timed out."""

    timed_out: int
    """Calls that timed out."""

    slow: int
    """Slow calls, failed or not."""

    cancelled: int
    """Calls that were cancelled from outside."""

    transitions: tuple[Transition, ...]
    """The last transitions, oldest first."""
