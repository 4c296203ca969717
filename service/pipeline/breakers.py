"""The circuit breakers, built from the settings, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from betrace.channels import Breaker, BreakerOptions, BreakerState, ExpectedError, Transition
from betrace.service.config.stages import BreakerSettings
from betrace.service.config.stages import BreakersSettings as Configured
from betrace.service.telemetry import events

EVALUATION, LEDGER, DUCKDB = NAMES = ("rule-evaluation", "ledger", "duckdb")
ACTIONS = ("trip", "reset", "force-open", "disable")
KINDS = ("successful", "failed", "timed_out", "slow", "not_permitted", "cancelled")


class PoisonError(ExpectedError):
    """An item that a store or destination can never accept. It does not count as a failure of the
    store."""


class Breakers:
    """One breaker for rule evaluation, one for each store, and one for each export destination
    (``exports`` are their names)."""

    def __init__(self, configured: Configured, exports: Sequence[str] = ()) -> None:
        def is_failure(error: Exception) -> bool:
            return not isinstance(error, PoisonError)

        def breaker(name: str, limits: BreakerSettings) -> Breaker:
            return Breaker(
                name,
                _options(limits),
                is_failure=is_failure,
                on_transition=lambda change: _report(name, change),
            )

        self.evaluation = breaker(EVALUATION, configured.evaluation)
        self.ledger = breaker(LEDGER, configured.storage)
        self.duckdb = breaker(DUCKDB, configured.storage)
        self.exports = {name: breaker(name, configured.export) for name in exports}
        every = (self.evaluation, self.ledger, self.duckdb, *self.exports.values())
        self._by_name = {b.name: b for b in every}

    def __iter__(self) -> Iterator[Breaker]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Breaker:
        return self._by_name[name]

    def act(self, name: str, action: str) -> None:
        """Perform an operator's action, one of :data:`ACTIONS`. Raises KeyError."""
        breaker = self._by_name[name]
        actions: dict[str, Callable[[], None]] = {
            "trip": breaker.trip,
            "reset": breaker.reset,
            "force-open": breaker.force_open,
            "disable": breaker.disable,
        }
        actions[action]()


def _report(name: str, change: Transition) -> None:
    opened = change.after in (BreakerState.OPEN, BreakerState.FORCED_OPEN)
    event = events.BREAKER_OPENED if opened else events.BREAKER_CHANGED
    before, after = str(change.before), str(change.after)
    event(breaker=name, before=before, after=after, reason=change.reason)


def _options(settings: BreakerSettings) -> BreakerOptions:
    return BreakerOptions(
        window=settings.window_calls,
        minimum_calls=settings.minimum_calls,
        failure_rate=settings.failure_rate,
        slow_rate=settings.slow_call_rate,
        slow_after=settings.slow_call_seconds,
        open_for=settings.open_seconds,
        trial_calls=settings.half_open_calls,
        timeout=settings.timeout_seconds,
    )


def status(breaker: Breaker) -> str:
    """The component's status: ok, or degraded while calls are refused or not counted."""
    return "ok" if breaker.state is BreakerState.CLOSED else "degraded"


def calls(breaker: Breaker) -> dict[str, int]:
    """Calls since the start by kind (:data:`KINDS`). A call that timed out does not count as
    failed; a slow call counts twice."""
    now = breaker.snapshot()
    counts = (
        now.succeeded,
        now.failed - now.timed_out,
        now.timed_out,
        now.slow,
        now.not_permitted,
        now.cancelled,
    )
    return dict(zip(KINDS, counts, strict=True))


def shown(breaker: Breaker, wall_time: Callable[[float], float]) -> dict[str, Any]:
    """A breaker as JSON. ``wall_time`` converts a time of Trio's clock to seconds since 1970."""
    now = breaker.snapshot()
    limits = breaker.settings
    return {
        "name": now.name,
        "state": str(now.state),
        "since": None if now.since is None else wall_time(now.since),
        "failureRate": now.failure_rate,
        "slowCallRate": now.slow_rate,
        "windowCalls": now.window_calls,
        "trialsLeft": now.trials_left,
        "retryInSeconds": None if math.isinf(now.retry_in) else round(now.retry_in, 3),
        "running": now.running,
        "calls": calls(breaker),
        "settings": {
            "timeoutSeconds": limits.timeout,
            "failureRate": limits.failure_rate,
            "slowCallRate": limits.slow_rate,
            "slowCallSeconds": limits.slow_after,
            "windowCalls": limits.window,
            "minimumCalls": limits.minimum_calls,
            "openSeconds": limits.open_for,
            "halfOpenCalls": limits.trial_calls,
        },
        "transitions": [
            {
                "at": wall_time(each.at),
                "before": str(each.before),
                "after": str(each.after),
                "reason": each.reason,
            }
            for each in now.transitions
        ],
    }
