"""A stage of a pipeline: workers that take batches from a channel, and redelivery of failed items.

::

    async def store(batch: list[Record]) -> None: ...
    async def keep(item: Record, error: Exception, attempts: int) -> None: ...

    send, receive = open_channel("storage", 10_000, len, hold=True)
    options = StageOptions(on_dead=keep, workers=2, max_batch_weight=500)
    stage = Stage("storage", receive, store, options)
    await nursery.start(stage.run)
    ...
    send.close()                 # the stage finishes what it has, then `run` returns

**Delivery.** A batch that fails is redelivered item by item, so that one bad item fails alone. Each
item is redelivered after ``retry_delay`` seconds, up to ``attempts`` deliveries in total, and then
goes to ``on_dead``. If ``on_dead`` fails, the stage keeps the item and calls ``on_dead`` again
after a growing pause. A handler may see an item more than once and must be idempotent. The stage
keeps an item until the handler returned or ``on_dead`` took it; only cancelling `Stage.run` ends
the stage with items in it.

**Bounds.** An item uses the channel's capacity until it is finished, even while it waits for
redelivery, so the stage never contains more than its channel's capacity. If all items fail, the
stage fills up and then blocks its senders. Waiting for redelivery takes no worker's time. A
redelivery that is due competes with the workers for one of ``workers`` turns to call the handler,
first come, first served. So neither redeliveries nor new items starve, and with ``workers=1`` the
handler never runs twice at once.

**Errors.** An `ExpectedError` (or another kind listed in ``expected``) is counted. Any other
Exception is a bug: it is logged with its traceback, and the worker is restarted after a pause. The
items are redelivered in both cases.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

from betrace.channels.batcher import Batcher, Pacing
from betrace.channels.channel import ReceiveChannel
from betrace.channels.errors import is_expected
from betrace.channels.intervals import Intervals
from betrace.channels.stage_options import StageOptions, StageStatistics
from betrace.channels.supervisor import backoff, supervise

T = TypeVar("T")

logger = logging.getLogger("channels.stage")

OBSERVED_SECONDS = 0.05
"""Of the items that are handled directly, ``on_done`` sees one in so many seconds, because
observing it can cost a fifth of handling it."""

LONGEST_BURIAL_PAUSE = 30.0
"""Maximum seconds between two calls of ``on_dead`` for one item."""


class _Delivery(Generic[T]):
    """An item that the stage has taken and not finished."""

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
      receive: the channel's receiving end, opened with ``hold=True``. The stage closes it when it
        ends.
      handler: called with one batch, a list of at least one item. It returns when all is done.
      options: see `StageOptions`.

    Raises:
      ValueError: an option cannot work, or the channel was opened without ``hold``.
    """

    def __init__(
        self,
        name: str,
        receive: ReceiveChannel[T],
        handler: Callable[[list[T]], Awaitable[object]],
        options: StageOptions[T],
    ) -> None:
        if not receive.hold:
            raise ValueError(
                f"stage {name}: open its channel with hold=True, to bound the items in the stage"
            )
        options.check(name)
        self.name = name
        self._receive = receive
        self._handler = handler
        self._options = options
        self._batches = _batches(receive, options)
        self._direct_until = -math.inf
        self._direct_weight = 0  # before that time
        self._observe_from = -math.inf
        if options.direct is not None:
            receive.receive_directly(self._handle_directly)
        self._turns = trio.Semaphore(options.workers)
        self._waiting: list[tuple[float, int, _Delivery[T]]] = []  # a heap by time due
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
        """Stop calling the handler and ``on_dead``; running calls finish.

        Each worker may still take one batch from the channel, which then waits in the stage.
        """
        if not self.paused:
            self._resumed = trio.Event()

    def resume(self) -> None:
        """Continue after `pause`."""
        self._resumed_at = trio.current_time()
        self._resumed.set()

    async def drained(self) -> None:
        """Wait until nothing is queued, in flight or waiting for redelivery."""
        await self._receive.wait_empty()

    def stalled(self, after: float) -> bool:
        """Return whether there has been input but no progress for ``after`` seconds.

        Progress is an item finished or declared dead. A paused stage is not stalled.
        """
        busy_since = self._receive.statistics().busy_since
        if busy_since is None or self.paused:
            return False
        marks = [busy_since, self._last_progress, self._resumed_at]
        return trio.current_time() - max(mark for mark in marks if mark is not None) >= after

    def statistics(self) -> StageStatistics:
        """Return the stage's counts and state."""
        return StageStatistics(
            name=self.name,
            workers=self._options.workers,
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
        """Run until the channel has ended and every item is finished."""
        with self._receive:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._redeliver, nursery)
                async with trio.open_nursery() as workers:
                    for number in range(1, self._options.workers + 1):
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
                items = await self._batches.next()
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return
            batch = [_Delivery(item, self._receive.weigh(item)) for item in items]
            self._items_in += len(batch)
            self._weight_in += sum(delivery.weight for delivery in batch)
            await self._take_turn()
            try:
                await self._deliver(batch, items)
            except Exception as error:
                # With a single attempt the burial is next; it need not wait.
                delay = self._options.retry_delay if self._options.attempts > 1 else 0.0
                for delivery in batch:
                    self._wait(delivery, delay)
                if not is_expected(error, self._options.expected):
                    raise
            finally:
                self._turns.release()

    def _handle_directly(self, item: T) -> bool:
        """Let ``options.direct`` handle an item, and return whether it did."""
        options = self._options
        direct = options.direct
        if direct is None or self.paused or self._busy or self._waiting:
            return False
        started = trio.current_time()
        if started >= self._direct_until:
            self._direct_until = started + options.interval
            self._direct_weight = 0
        elif self._direct_weight >= (options.enough or 0):
            return False
        if not direct(item):
            return False
        weight = self._receive.weigh(item)
        self._direct_weight += weight
        self._items_in += 1
        self._weight_in += weight
        self._items_out += 1
        self._weight_out += weight
        self._last_progress = trio.current_time()
        seconds = self._last_progress - started
        self._report_if_slow([item], seconds, None)
        if started >= self._observe_from:
            self._observe_from = started + OBSERVED_SECONDS
            self._observe(seconds, weight)
        return True

    async def _take_turn(self) -> None:
        """Wait for a turn to call the handler, and until the stage is not paused."""
        if not self.paused:
            try:
                self._turns.acquire_nowait()
            except trio.WouldBlock:
                pass
            else:
                return  # no checkpoint: receiving the batch was one
        await self._resumed.wait()
        await self._turns.acquire()
        while self.paused:
            self._turns.release()
            await self._resumed.wait()
            await self._turns.acquire()

    async def _deliver(self, batch: list[_Delivery[T]], items: list[T]) -> None:
        """Call the handler once. Records an exception with the items and raises it again."""
        started = trio.current_time()
        self._busy += 1
        try:
            await self._handler(items)
        except Exception as error:
            self._failed += 1
            self._last_error = repr(error)
            for delivery in batch:
                delivery.attempts += 1
                delivery.error = error
            self._report_if_slow(items, trio.current_time() - started, error)
            raise
        finally:
            self._busy -= 1
        weight = sum(delivery.weight for delivery in batch)
        self._items_out += len(batch)
        self._weight_out += weight
        self._last_progress = trio.current_time()
        self._receive.done(weight)
        seconds = self._last_progress - started
        self._report_if_slow(items, seconds, None)
        self._observe(seconds, weight)

    def _observe(self, seconds: float, weight: int) -> None:
        if self._options.on_done is not None:
            try:
                self._options.on_done(seconds, weight)
            except Exception:  # the batch is done in any case
                logger.exception("stage %s: the observer on_done failed", self.name)

    def _report_if_slow(self, items: list[T], seconds: float, error: Exception | None) -> None:
        if self._options.on_slow is not None and seconds >= self._options.slow_after:
            try:
                self._options.on_slow(items, seconds, error)
            except Exception:
                logger.exception("stage %s: the observer on_slow failed", self.name)

    def _wait(self, delivery: _Delivery[T], seconds: float) -> None:
        self._sequence += 1
        heapq.heappush(self._waiting, (trio.current_time() + seconds, self._sequence, delivery))
        self._more_waiting.unpark_all()

    async def _redeliver(self, nursery: trio.Nursery) -> None:
        """Start a retry for each item that is due; each takes a turn."""
        while True:
            if not self._waiting:
                await self._more_waiting.park()
            elif (due := self._waiting[0][0]) > trio.current_time():
                with trio.move_on_at(due):
                    await self._more_waiting.park()
            else:
                await self._take_turn()
                _, _, delivery = heapq.heappop(self._waiting)
                nursery.start_soon(self._retry, delivery)

    async def _retry(self, delivery: _Delivery[T]) -> None:
        """Deliver one item again, or bury it, then release the turn."""
        try:
            if delivery.attempts < self._options.attempts:
                self._redelivered += 1
                try:
                    await self._deliver([delivery], [delivery.item])
                except Exception as error:
                    if delivery.attempts < self._options.attempts:
                        self._wait(delivery, self._options.retry_delay)
                        return
                    unexpected = not is_expected(error, self._options.expected)
                    logger.log(
                        logging.ERROR if unexpected else logging.INFO,
                        "stage %s gave up an item after %d deliveries: %r",
                        self.name,
                        delivery.attempts,
                        error,
                        exc_info=error if unexpected else None,
                    )
                else:
                    return
            await self._bury(delivery)
        finally:
            self._turns.release()

    async def _bury(self, delivery: _Delivery[T]) -> None:
        assert delivery.error is not None
        try:
            await self._options.on_dead(delivery.item, delivery.error, delivery.attempts)
        except Exception:
            self._burial_failures += 1
            delivery.burials += 1
            first = max(self._options.retry_delay, 0.1)
            pause = backoff(delivery.burials, first, LONGEST_BURIAL_PAUSE)
            logger.exception("stage %s: on_dead failed; calling it again in %g s", self.name, pause)
            self._wait(delivery, pause)
        else:
            self._dead += 1
            self._dead_weight += delivery.weight
            self._last_progress = trio.current_time()
            self._receive.done(delivery.weight)


def _batches(receive: ReceiveChannel[T], options: StageOptions[T]) -> Batcher[T] | Intervals[T]:
    """What takes batches from the channel."""
    max_weight = options.max_batch_weight or receive.capacity
    if options.max_batch_wait <= 0 and options.batch_key is None:
        enough = options.enough or max_weight
        return Intervals(receive, max_weight, options.interval, enough, adapts=options.adapts)
    pacing = None
    if options.pace is not None:
        pacing = Pacing(
            options.pace, options.urgent, options.most_batch_wait, receive.capacity * 3 // 4
        )
    return Batcher(
        receive,
        max_weight,
        options.max_batch_wait,
        key=options.batch_key,
        max_keys=options.max_batch_keys,
        pacing=pacing,
    )
