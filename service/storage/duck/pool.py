"""A bounded pool of items, each for one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class PoolTimeout(Exception):  # noqa: N818
    """All items were in use for as long as the caller waits."""


class Pool(Generic[T]):
    """Up to ``limit`` items, made on demand; up to ``idle`` unused ones stay open.

    A caller waits up to ``timeout`` seconds for an item, then gets :exc:`PoolTimeout`. An item
    whose use ends with an exception is closed and not used again. Thread-safe.
    """

    def __init__(
        self,
        make: Callable[[], T],
        close: Callable[[T], None],
        *,
        limit: int,
        idle: int,
        timeout: float,
        name: str = "pool",
    ) -> None:
        self._make = make
        self._close = close
        self._limit = limit
        self._keep = idle
        self._timeout = timeout
        self._name = name
        self._idle: list[T] = []
        self._used: list[T] = []
        self._open = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def open(self) -> int:
        """The number of items, in use or idle."""
        return self._open

    @property
    def in_use(self) -> list[T]:
        """The items in use."""
        with self._changed:
            return list(self._used)

    @contextmanager
    def use(self) -> Iterator[T]:
        """An item, until the block ends."""
        item = self._take()
        with self._changed:
            self._used.append(item)
        good = False
        try:
            yield item
            good = True
        finally:
            with self._changed:
                self._used.remove(item)
            self._give(item, good)

    def _take(self) -> T:
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._idle or self._open < self._limit, self._timeout
            )
            if not free:
                raise PoolTimeout(
                    f"{self._name}: all {self._limit} connections were in use for "
                    f"{self._timeout:g} s; try again, or raise duckdb.pool_max"
                )
            if self._idle:
                return self._idle.pop()
            self._open += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._open -= 1
                self._changed.notify()
            raise

    def _give(self, item: T, good: bool) -> None:
        with self._changed:
            keep = good and not self._closed and len(self._idle) < self._keep
            if keep:
                self._idle.append(item)
                self._changed.notify()
                return
        try:
            self._close(item)
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify()

    def close(self) -> None:
        """Close the idle items now, and those in use when they are returned."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._open -= len(idle)
        for item in idle:
            self._close(item)
