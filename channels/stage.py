"""A stage of a pipeline: workers that take batches from a channel, and redelivery of what failed.

::

    async def store(batch: list[Record]) -> None: ...
    async def keep(item: Record, error: Exception, attempts: int) -> None: ...

    send, receive = open_channel("storage", 10_000, len, hold=True)
    stage = Stage("storage", receive, store, workers=2, max_batch_weight=500, on_dead=keep)
    await nursery.start(stage.run)
    ...
    send.close()                 # the stage finishes what it has, then `run` returns

**Delivery.** A batch that fails is redelivered item by item, so that one bad item fails alone: each
item after ``retry_delay`` seconds, up to ``attempts`` deliveries in all, and then it goes to
``on_dead``. If ``on_dead`` fails, the item is kept and ``on_dead`` tried again, with a growing
pause. A handler sees an item more than once, so it must not matter to it. No item is let go before
the handler returned or ``on_dead`` took it; only cancelling `Stage.run` ends the stage with items
in it.

**Bounds.** An item uses the channel's capacity until it is finished, also while it waits for
redelivery. So the stage never holds more than its channel's capacity: a stage whose items all fail
takes fresh ones only as far as there is room, then blocks its senders. Waiting for redelivery takes
no worker's time. When a redelivery is due it competes with the workers for one of ``workers`` turns
to call the handler, first come, first served, so neither redeliveries nor fresh items wait for
ever, and with ``workers=1`` the handler is never called twice at once.

**Errors.** An `ExpectedError` (or another of the kinds given as ``expected``) is counted. Any other
Exception is a bug: it is logged with its traceback and the worker is restarted after a pause; the
items are redelivered all the same.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from betrace.channels.batcher import Batcher, Pace
from betrace.channels.channel import ReceiveChannel
from betrace.channels.errors import ExpectedError, is_expected
from betrace.channels.supervisor import backoff, supervise

T = TypeVar("T")

logger = logging.getLogger(__name__)

LONGEST_BURIAL_PAUSE = 30.0
"""The longest time in seconds between two tries of ``on_dead`` for one item."""


@dataclass(frozen=True, slots=True)
class StageStatistics:
    """A stage at one moment. ``items_in == items_out + dead + items_held``."""

    name: str
    """What the stage is called."""

    workers: int
    """How many handler calls may run at once."""

    busy_workers: int
    """How many run now."""

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
    """Items taken and not finished: being handled, or waiting to be redelivered."""

    waiting: int
    """Items waiting to be redelivered, or for ``on_dead`` to work again."""

    failed: int
    """Handler calls that raised."""

    redelivered: int
    """Handler calls with a single item that had failed before."""

    burial_failures: int
    """Calls of ``on_dead`` that raised."""

    restarts: int
    """How often a worker was restarted after an unexpected error."""

    last_error: str | None
    """The last error of a handler call, as text."""

    last_progress: float | None
    """`trio.current_time` of when an item was last finished or declared dead; None before."""


class _Held(Generic[T]):
    """An item that the stage answers for."""

    __slots__ = ("attempts", "burials", "error", "item", "weight")

    def __init__(self, item: T, weight: int) -> None:
        self.item = item
        self.weight = weight
        self.attempts = 0
        self.burials = 0
        self.error: Exception | None = None


class Stage(Generic[T]):
    """Workers that pass batches of a channel's items to a handler. See the module's description.

    Args:
      name: for statistics and the log.
      receive: the channel's receiving end, opened with ``hold=True``. The stage closes it at its
        end.
      handler: called with one batch, a list of at least one item. Returning means that all is done.
      workers: how many handler calls may run at once.
      max_batch_weight: the most that a batch weighs, single heavier items apart; by default the
        channel's capacity, that is, all there is.
      max_batch_wait: how many seconds a batch may wait to grow; with 0 it is what there is.
      batch_key: if given, a batch holds only items of one key (a tenant, say).
      max_batch_keys: how many batches of different keys may grow at once.
      pace, urgent, most_batch_wait: as `Batcher` has them; while more than three quarters of the
        channel's capacity wait, batches come out whatever the pace.
      attempts: how often an item is delivered in all before it is dead.
      retry_delay: seconds between an item's failure and its redelivery.
      on_dead: takes an item that failed for good, its last error, and the number of deliveries.
      expected: the kinds of errors that are not bugs.
      on_done: observer called with (seconds, weight) of each successful handler call.
      on_slow: observer called before it with (items, seconds, error) of each handler call that took
        ``slow_after`` seconds or more; error is None if it was successful.
      slow_after: see ``on_slow``.

    Raises:
      ValueError: a setting that cannot work.
    """

    def __init__(
        self,
        name: str,
        receive: ReceiveChannel[T],
        handler: Callable[[list[T]], Awaitable[object]],
        *,
        on_dead: Callable[[T, Exception, int], Awaitable[object]],
        workers: int = 1,
        max_batch_weight: int | None = None,
        max_batch_wait: float = 0.0,
        batch_key: Callable[[T], Hashable] | None = None,
        max_batch_keys: int = 64,
        pace: Pace | None = None,
        urgent: Callable[[T], bool] | None = None,
        most_batch_wait: float = float("inf"),
        attempts: int = 4,
        retry_delay: float = 1.0,
        expected: tuple[type[Exception], ...] = (ExpectedError,),
        on_done: Callable[[float, int], None] | None = None,
        on_slow: Callable[[list[T], float, Exception | None], None] | None = None,
        slow_after: float = math.inf,
    ) -> None:
        if not receive.hold:
            raise ValueError(
                f"stage {name}: open its channel with hold=True, to bound what it holds"
            )
        if workers < 1 or attempts < 1 or retry_delay < 0:
            raise ValueError(
                f"stage {name}: workers ({workers}) and attempts ({attempts}) must be 1 or more, "
                f"retry_delay ({retry_delay}) 0 or more"
            )
        if max_batch_weight is not None and max_batch_weight < 1:
            raise ValueError(
                f"stage {name}: max_batch_weight is {max_batch_weight}; it must be 1 or more"
            )
        self.name = name
        self._receive = receive
        self._handler = handler
        self._on_dead = on_dead
        self._workers = workers
        self._max_batch_weight = max_batch_weight or receive.capacity
        self._batcher: Batcher[T] | None = None
        if max_batch_wait > 0 or batch_key is not None:
            self._batcher = Batcher(
                receive,
                self._max_batch_weight,
                max_batch_wait,
                key=batch_key,
                max_keys=max_batch_keys,
                pace=pace,
                urgent=urgent,
                most_wait=most_batch_wait,
                most_weight=receive.capacity * 3 // 4,
            )
        self._attempts = attempts
        self._retry_delay = retry_delay
        self._expected = expected
        self._on_done = on_done
        self._on_slow = on_slow
        self._slow_after = slow_after
        self._turns = trio.Semaphore(workers)
        self._waiting: list[tuple[float, int, _Held[T]]] = []  # a heap by time due
        self._sequence = 0
        self._more_waiting = trio.lowlevel.ParkingLot()
        self._resumed = trio.Event()
        self._resumed.set()
        self._resumed_at: float | None = None
        self._busy = 0
        self._items_in = self._weight_in = 0
        self._items_out = self._weight_out = 0
        self._dead = self._dead_weight = 0
        self._failed = self._redelivered = self._burial_failures = self._restarts = 0
        self._last_error: str | None = None
        self._last_progress: float | None = None

    @property
    def paused(self) -> bool:
        """Whether the stage is paused."""
        return not self._resumed.is_set()

    def pause(self) -> None:
        """Stop calling the handler and ``on_dead``; calls that run are finished.

        Each worker may still take one batch from the channel, which then waits in the stage.
        """
        if not self.paused:
            self._resumed = trio.Event()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._resumed_at = trio.current_time()
        self._resumed.set()

    async def drained(self) -> None:
        """Wait until nothing is queued, in flight or waiting to be redelivered."""
        await self._receive.wait_empty()

    def stalled(self, after: float) -> bool:
        """Return whether there has been input, and no progress, for so many seconds.

        Progress is an item finished or declared dead. A paused stage is not stalled.
        """
        busy_since = self._receive.statistics().busy_since
        if busy_since is None or self.paused:
            return False
        marks = [busy_since, self._last_progress, self._resumed_at]
        return trio.current_time() - max(mark for mark in marks if mark is not None) >= after

    def statistics(self) -> StageStatistics:
        """Return what the stage holds and has done."""
        return StageStatistics(
            name=self.name,
            workers=self._workers,
            busy_workers=self._busy,
            paused=self.paused,
            items_in=self._items_in,
            weight_in=self._weight_in,
            items_out=self._items_out,
            weight_out=self._weight_out,
            dead=self._dead,
            dead_weight=self._dead_weight,
            items_held=self._items_in - self._items_out - self._dead,
            waiting=len(self._waiting),
            failed=self._failed,
            redelivered=self._redelivered,
            burial_failures=self._burial_failures,
            restarts=self._restarts,
            last_error=self._last_error,
            last_progress=self._last_progress,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the stage until its channel ended and everything in it is finished."""
        with self._receive:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._redeliver, nursery)
                async with trio.open_nursery() as workers:
                    for number in range(1, self._workers + 1):
                        workers.start_soon(self._supervise_worker, f"{self.name}-{number}")
                    task_status.started()
                await self._receive.wait_empty()
                nursery.cancel_scope.cancel()

    async def _supervise_worker(self, name: str) -> None:
        def count(_: Exception) -> None:
            self._restarts += 1

        await supervise(self._work, f"worker {name}", on_crash=count)

    async def _work(self) -> None:
        while True:
            try:
                if self._batcher is not None:
                    items = await self._batcher.next()
                else:
                    items = await self._receive.receive_some(self._max_batch_weight)
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return
            batch = [_Held(item, self._receive.weigh(item)) for item in items]
            self._items_in += len(batch)
            self._weight_in += sum(held.weight for held in batch)
            await self._take_turn()
            try:
                await self._deliver(batch, items)
            except Exception as error:
                for held in batch:
                    # With a single attempt the burial is next, which has no reason to wait.
                    self._wait(held, self._retry_delay if self._attempts > 1 else 0.0)
                if not is_expected(error, self._expected):
                    raise
            finally:
                self._turns.release()

    async def _take_turn(self) -> None:
        """Wait for a turn to call the handler, and as long as the stage is paused."""
        await self._resumed.wait()
        await self._turns.acquire()
        while self.paused:
            self._turns.release()
            await self._resumed.wait()
            await self._turns.acquire()

    async def _deliver(self, batch: list[_Held[T]], items: list[T]) -> None:
        """Call the handler once. Raises what it raises, after noting it with the items."""
        started = trio.current_time()
        self._busy += 1
        try:
            await self._handler(items)
        except Exception as error:
            self._failed += 1
            self._last_error = repr(error)
            for held in batch:
                held.attempts += 1
                held.error = error
            self._tell_if_slow(items, trio.current_time() - started, error)
            raise
        finally:
            self._busy -= 1
        weight = sum(held.weight for held in batch)
        self._items_out += len(batch)
        self._weight_out += weight
        self._last_progress = trio.current_time()
        self._receive.done(weight)
        seconds = self._last_progress - started
        self._tell_if_slow(items, seconds, None)
        if self._on_done is not None:
            try:
                self._on_done(seconds, weight)
            except Exception:  # the batch is done, whatever the observer thinks of it
                logger.exception("stage %s: the observer on_done failed", self.name)

    def _tell_if_slow(self, items: list[T], seconds: float, error: Exception | None) -> None:
        if self._on_slow is not None and seconds >= self._slow_after:
            try:
                self._on_slow(items, seconds, error)
            except Exception:
                logger.exception("stage %s: the observer on_slow failed", self.name)

    def _wait(self, held: _Held[T], seconds: float) -> None:
        self._sequence += 1
        heapq.heappush(self._waiting, (trio.current_time() + seconds, self._sequence, held))
        self._more_waiting.unpark_all()

    async def _redeliver(self, nursery: trio.Nursery) -> None:
        """Start a retry for each item that is due, in a turn of its own."""
        while True:
            if not self._waiting:
                await self._more_waiting.park()
            elif (due := self._waiting[0][0]) > trio.current_time():
                with trio.move_on_at(due):
                    await self._more_waiting.park()
            else:
                await self._take_turn()
                _, _, held = heapq.heappop(self._waiting)
                nursery.start_soon(self._retry, held)

    async def _retry(self, held: _Held[T]) -> None:
        """Deliver one item again, or bury it; gives back the turn."""
        try:
            if held.attempts < self._attempts:
                self._redelivered += 1
                try:
                    await self._deliver([held], [held.item])
                except Exception as error:
                    if held.attempts < self._attempts:
                        self._wait(held, self._retry_delay)
                        return
                    unexpected = not is_expected(error, self._expected)
                    logger.log(
                        logging.ERROR if unexpected else logging.INFO,
                        "stage %s gives up an item after %d deliveries: %r",
                        self.name,
                        held.attempts,
                        error,
                        exc_info=error if unexpected else None,
                    )
                else:
                    return
            await self._bury(held)
        finally:
            self._turns.release()

    async def _bury(self, held: _Held[T]) -> None:
        assert held.error is not None
        try:
            await self._on_dead(held.item, held.error, held.attempts)
        except Exception:
            self._burial_failures += 1
            held.burials += 1
            pause = backoff(held.burials, max(self._retry_delay, 0.1), LONGEST_BURIAL_PAUSE)
            logger.exception(
                "stage %s cannot put a dead item away; again in %g s", self.name, pause
            )
            self._wait(held, pause)
        else:
            self._dead += 1
            self._dead_weight += held.weight
            self._last_progress = trio.current_time()
            self._receive.done(held.weight)
