"""The pool keeps to its bounds."""

from __future__ import annotations

import threading
import time

import pytest

from betrace.service.storage.duck.pool import Pool, PoolTimeout


class Things:
    def __init__(self, **limits: float) -> None:
        self.made = 0
        self.closed: list[int] = []
        self.fail = False
        settings = {"limit": 2, "idle": 1, "timeout": 0.02} | limits
        self.pool = Pool(self.make, self.closed.append, name="things", **settings)  # type: ignore[arg-type]

    def make(self) -> int:
        if self.fail:
            raise RuntimeError("cannot make one")
        self.made += 1
        return self.made


def test_an_idle_one_is_used_again() -> None:
    things = Things()
    for _ in range(3):
        with things.pool.use() as item:
            assert item == 1
    assert (things.pool.open, things.closed) == (1, [])


def test_more_idle_than_wanted_are_closed() -> None:
    things = Things()
    with things.pool.use(), things.pool.use():
        assert things.pool.open == 2
    assert (things.pool.open, len(things.closed)) == (1, 1)


def test_when_all_are_in_use_the_caller_waits_then_gets_an_error() -> None:
    things = Things()
    with things.pool.use(), things.pool.use():
        start = time.monotonic()
        with (
            pytest.raises(PoolTimeout, match=r"things: all 2 connections .* 0\.02 s"),
            things.pool.use(),
        ):
            pass
        assert time.monotonic() - start >= 0.02
    with things.pool.use():
        pass


def test_a_waiting_caller_gets_what_another_gives_back() -> None:
    for idle in (0, 1):
        things = Things(limit=1, idle=idle, timeout=60)
        got = threading.Event()

        def work(things: Things = things, got: threading.Event = got) -> None:
            with things.pool.use():
                got.set()

        with things.pool.use():
            thread = threading.Thread(target=work)
            thread.start()
            assert not got.wait(0.02)
        assert got.wait(60)
        thread.join()


def test_one_whose_use_failed_is_not_used_again() -> None:
    things = Things()
    with pytest.raises(KeyError), things.pool.use():
        raise KeyError
    assert (things.closed, things.pool.open) == ([1], 0)


def test_a_failure_to_make_an_item_frees_its_place() -> None:
    things = Things(limit=1)
    things.fail = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="cannot make"), things.pool.use():
            pass
    things.fail = False
    with things.pool.use():
        assert things.pool.open == 1


def test_closing_closes_those_in_use_when_they_come_back() -> None:
    things = Things()
    with things.pool.use():
        with things.pool.use():
            pass
        things.pool.close()
        assert things.closed == [2]
    assert things.closed == [2, 1]
    assert things.pool.open == 0


def test_never_more_than_the_limit() -> None:
    things = Things(limit=3, timeout=60)
    most = 0

    def work() -> None:
        nonlocal most
        for _ in range(50):
            with things.pool.use():
                most = max(most, things.pool.open)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 3
    assert things.made - len(things.closed) == things.pool.open <= 1


def test_items_in_use_are_listed() -> None:
    things = Things()
    with things.pool.use() as one, things.pool.use() as two:
        assert things.pool.in_use == [one, two]
    assert things.pool.in_use == []
