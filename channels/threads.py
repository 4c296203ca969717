"""Calls in a bounded number of long-lived worker threads, which are abandoned when they hang.

A call costs less than with `trio.to_thread.run_sync`, because the threads wait for work on one
queue and wake Trio directly. A thread that hangs is abandoned and replaced, so that stuck calls
into a library do not use up the threads. In return, `trio.from_thread` needs an explicit token, and
context variables are not copied.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar, TypeVarTuple, cast, final

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, TrioToken

from betrace.channels.errors import TransientError

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class ThreadTimeout(TransientError):  # noqa: N818 (as trio names its own)
    """A call in a worker thread took too long, or waited too long for a free thread."""


@dataclass(frozen=True, slots=True)
class ThreadStatistics:
    """A `ThreadRunner` at one moment."""

    name: str
    """The runner's name."""

    threads: int
    """How many calls may run at once."""

    running: int
    """How many are running, without those left behind."""

    waiting: int
    """How many tasks wait for a thread."""

    calls: int
    """Calls started in a thread since the start."""

    abandoned: int
    """Calls left behind since the start."""

    left_behind: int
    """How many of those are still running."""


class _Job(Generic[R]):
    __slots__ = ("abandoned", "error", "fn", "keeps_slot", "result", "task")

    def __init__(self, task: Task, fn: Callable[[], R]) -> None:
        self.task = task
        self.fn = fn
        self.result: R | None = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.keeps_slot = False


@final
class ThreadRunner:
    """Runs functions in up to ``threads`` threads, started on demand.

    ::

        with ThreadRunner("duckdb", threads=2) as threads:
            rows = await threads.run(query, "SELECT 1", timeout=5.0)

    A thread left behind no longer counts: another replaces it, and it ends when its call returns.
    At most ``max_left_behind`` are replaced at a time; beyond that, hanging calls use up the
    threads and further calls wait. The threads are daemons: a hanging one does not stop the process
    from exiting.

    Args:
      name: of the runner and, numbered, of its threads.
      threads: how many calls may run at once, 1 or more.
      max_left_behind: how many hanging threads may be replaced at a time.
      busy: how many of the calls may use the CPU at once, if fewer: the others wait for a thread,
        except within :meth:`waiting`. Threads that take one call after the other cost less than
        many that contend for the interpreter.
    """

    def __init__(
        self, name: str, threads: int, *, max_left_behind: int = 8, busy: int | None = None
    ) -> None:
        if threads < 1:
            raise ValueError(f"thread runner {name}: threads is {threads}; it must be 1 or more")
        self._busy = threads if busy is None else busy
        self._resting = 0  # calls within waiting()
        self.name = name
        self._threads = threads
        self._max_left_behind = max_left_behind
        self._slots = trio.Semaphore(threads)
        # Each call has a slot, so there need be no more threads than slots in use, and fewer if not
        # all may be busy.
        self._jobs: SimpleQueue[_Job[object] | None] = SimpleQueue()
        self._token: TrioToken | None = None
        self._started = 0
        self._alive = 0
        self._running = 0
        self._calls = 0
        self._abandoned = 0
        self._left_behind = 0
        self._closed = False

    async def run(
        self,
        fn: Callable[[*Ts], R],
        *args: *Ts,
        timeout: float | None = None,
        abandon_on_cancel: bool = False,
    ) -> R:
        """Return the result of ``fn(*args)``, called in a thread.

        Args:
          timeout: seconds for the whole call, including the wait for a thread. A thread that is
            still running then is left behind and counted.
          abandon_on_cancel: what to do when the caller is cancelled while the thread runs: leave
            the thread behind (True), or wait for its result, at most for the timeout (False), so
            that nobody closes what the thread still uses.

        Raises:
          ThreadTimeout: the call took too long. ``fn`` may have done its work, unless the message
            says that it was not started.
          trio.ClosedResourceError: the runner is closed.
          BaseException: what ``fn`` raised.
        """
        deadline = math.inf if timeout is None else trio.current_time() + timeout
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_at(deadline) as scope:
                await self._slots.acquire()
            if scope.cancelled_caught:
                raise ThreadTimeout(
                    f"{self.name}: no thread was free within {timeout} s; not started"
                ) from None
        if self._closed:
            self._slots.release()
            raise trio.ClosedResourceError(f"thread runner {self.name} is closed")
        job: _Job[R] = _Job(trio.lowlevel.current_task(), lambda: fn(*args))
        self._start(cast("_Job[object]", job))

        def abort(_: RaiseCancelT) -> Abort:
            if timeout is None and not abandon_on_cancel:
                return Abort.FAILED
            self._abandon(cast("_Job[object]", job))
            return Abort.SUCCEEDED

        if timeout is None:
            await trio.lowlevel.wait_task_rescheduled(abort)
        else:
            with trio.CancelScope(deadline=deadline, shield=not abandon_on_cancel) as scope:
                await trio.lowlevel.wait_task_rescheduled(abort)
            if scope.cancelled_caught:
                raise ThreadTimeout(f"{self.name}: no result after {timeout} s; thread left behind")
        if job.error is not None:
            try:
                raise job.error
            finally:
                del job  # the exception's traceback holds this frame: no reference cycle
        return cast("R", job.result)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the call of this thread only waits for something, another one may use the CPU. Use
        it within a call, in its thread."""
        self._soon(self._rest)
        try:
            yield
        finally:
            self._soon(self._resume)

    def statistics(self) -> ThreadStatistics:
        """Return what is running and what ran."""
        return ThreadStatistics(
            name=self.name,
            threads=self._threads,
            running=self._running,
            waiting=self._slots.statistics().tasks_waiting,
            calls=self._calls,
            abandoned=self._abandoned,
            left_behind=self._left_behind,
        )

    def close(self) -> None:
        """Refuse further calls, and end each thread when its call has returned."""
        if not self._closed:
            self._closed = True
            for _ in range(self._alive):
                self._jobs.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, job: _Job[object]) -> None:
        self._calls += 1
        self._running += 1
        self._staff()
        self._jobs.put(job)

    def _staff(self) -> None:
        """Start a thread, if there are too few."""
        if self._alive >= min(self._running, self._busy + self._resting):
            return
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        self._alive += 1
        self._started += 1
        threading.Thread(
            target=self._serve,
            args=(self._token,),
            name=f"{self.name}-{self._started}",
            daemon=True,
        ).start()

    def _rest(self) -> None:
        self._resting += 1
        if not self._closed:
            self._staff()

    def _resume(self) -> None:
        self._resting -= 1
        if not self._closed and self._alive > self._busy + self._resting:
            self._alive -= 1
            self._jobs.put(None)

    def _soon(self, function: Callable[[], None]) -> None:
        assert self._token is not None
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    def _abandon(self, job: _Job[object]) -> None:
        job.abandoned = True
        self._abandoned += 1
        self._left_behind += 1
        self._running -= 1
        self._alive -= 1
        job.keeps_slot = self._left_behind > self._max_left_behind
        if not job.keeps_slot:
            self._slots.release()

    def _finished(self, job: _Job[object]) -> None:
        """Finish a job. Runs on Trio's thread, so that nothing here races."""
        if not job.abandoned:
            self._running -= 1
            self._slots.release()
            trio.lowlevel.reschedule(job.task)
            return
        self._left_behind -= 1
        if job.keeps_slot:
            self._slots.release()
        # The abandoned thread waits for work again, and another may have replaced it.
        if self._closed or self._alive >= min(self._threads, self._busy + self._resting):
            self._jobs.put(None)
        else:
            self._alive += 1

    def _serve(self, token: TrioToken) -> None:
        """Run jobs until the runner is closed or Trio has ended; the threads' main function."""
        set_system_name(self.name)
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.fn()
            except BaseException as error:  # raised in the caller
                job.error = error
            try:
                token.run_sync_soon(self._finished, job)
            except trio.RunFinishedError:
                return
            del job


def set_system_name(name: str) -> None:
    """Set this thread's name in the system, so that ``top -H`` shows what uses the CPU. Linux keeps
    15 bytes of it. Does nothing on other systems, or if /proc cannot be written."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
