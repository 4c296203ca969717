"""What a stage is given, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from betrace.channels.batcher import Pace
from betrace.channels.errors import ExpectedError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)  # no slots: they break StageOptions[T](…)
class StageOptions(Generic[T]):
    """How a stage takes, delivers, and gives up items."""

    on_dead: Callable[[T, Exception, int], Awaitable[object]]
    """Takes an item that failed for good, its last error, and the number of deliveries."""

    workers: int = 1
    """How many handler calls may run at once."""

    max_batch_weight: int | None = None
    """Maximum weight of a batch; a single heavier item is a batch of its own. None means the
    channel's capacity."""

    interval: float = 0.0
    """Minimum seconds between the starts of two batches, so that items that arrive one by one are
    handled together. An item that arrives after a longer pause is handled at once. Not used with
    ``max_batch_wait`` or ``batch_key``."""

    enough: int | None = None
    """A queued weight that starts the next batch before the interval is over. None means
    ``max_batch_weight``."""

    adapts: bool = False
    """Whether a batch also starts when as many items are queued as can be expected within the
    interval. It is meant for senders that wait for the outcome of their items before they send
    more: once all of them have sent, waiting for the interval to end would be in vain."""

    direct: Callable[[T], bool] | None = None
    """Handles an item at once, in the sender's call, or returns False. A stage without other work
    offers it each item first, up to a weight of ``enough`` in each interval, because passing a
    small item on can cost more than handling it. It must not raise."""

    max_batch_wait: float = 0.0
    """Seconds that a batch may wait to grow; 0 takes what is queued."""

    batch_key: Callable[[T], Hashable] | None = None
    """If set, a batch holds items of one key only (a tenant, for example)."""

    max_batch_keys: int = 64
    """How many batches of different keys may grow at once."""

    pace: Pace | None = None
    """Delays batches; see `Pacing`. It does not apply while more than three quarters of the
    channel's capacity wait."""

    urgent: Callable[[T], bool] | None = None
    """Whether an item's batch goes first; see `Pacing`."""

    most_batch_wait: float = math.inf
    """Seconds after which a batch comes out at any pace; see `Pacing`."""

    attempts: int = 4
    """How often an item is delivered before it is dead."""

    retry_delay: float = 1.0
    """Seconds between an item's failure and its redelivery."""

    expected: tuple[type[Exception], ...] = (ExpectedError,)
    """Errors that are not bugs."""

    on_done: Callable[[float, int], None] | None = None
    """Observer, called with (seconds, weight) after each successful handler call."""

    on_slow: Callable[[list[T], float, Exception | None], None] | None = None
    """Observer, called before ``on_done`` with (items, seconds, error) for each handler call that
    took at least ``slow_after`` seconds; error is None if it succeeded."""

    slow_after: float = math.inf
    """Seconds; see ``on_slow``."""

    def check(self, stage: str) -> None:
        """Raise ValueError if an option cannot work."""
        if self.workers < 1 or self.attempts < 1 or self.retry_delay < 0:
            raise ValueError(
                f"stage {stage}: workers ({self.workers}) and attempts ({self.attempts}) must be "
                f"1 or more, retry_delay ({self.retry_delay}) 0 or more"
            )
        if self.max_batch_weight is not None and self.max_batch_weight < 1:
            raise ValueError(
                f"stage {stage}: max_batch_weight is {self.max_batch_weight}; it must be 1 or more"
            )


@dataclass(frozen=True, slots=True)
class StageStatistics:
    """A stage at one moment. ``items_in == items_out + dead + items_held``."""

    name: str
    """The stage's name."""

    workers: int
    """How many handler calls may run at once."""

    busy_workers: int
    """How many are running."""

    paused: bool
    """Whether an operator paused the stage."""

    items_in: int
    """Items taken from the channel."""

    weight_in: int
    """Their weight."""

    items_out: int
    """Items that the handler finished."""

    weight_out: int
    """Their weight."""

    dead: int
    """Items that ``on_dead`` took."""

    dead_weight: int
    """Their weight."""

    items_held: int
    """Items taken and not finished: in the handler, or waiting for redelivery."""

    waiting: int
    """Items waiting for redelivery, or for another call of ``on_dead``."""

    failed: int
    """Handler calls that raised."""

    redelivered: int
    """Redeliveries: handler calls with a single item that had failed before."""

    burial_failures: int
    """Calls of ``on_dead`` that raised."""

    restarts: int
    """How often a worker was restarted after an unexpected error."""

    last_error: str | None
    """The last error of a handler call, as text."""

    last_progress: float | None
    """`trio.current_time` when an item was last finished or declared dead; None before that."""
