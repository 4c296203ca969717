"""The client in use and its replacement."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from betrace.service.storage.ledger import clients
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.clients import MOST_LEFT_BEHIND, Clients


class Client:
    def __init__(self) -> None:
        self.closed = 0


class Made:
    """Clients that were made; ``hang`` begins calls that return at :meth:`release`."""

    def __init__(self, pause: float = 0.0) -> None:
        self.all: list[Client] = []
        self.clients = Clients(self._make, self._dispose, pause=pause)
        self._released = threading.Event()
        self._threads: list[threading.Thread] = []

    def _make(self) -> Client:
        self.all.append(Client())
        return self.all[-1]

    def _dispose(self, client: Client) -> None:
        client.closed += 1

    def hang(self) -> None:
        inside = threading.Event()

        def call() -> None:
            with self.clients.use():
                inside.set()
                self._released.wait(60)

        thread = threading.Thread(target=call)
        thread.start()
        self._threads.append(thread)
        assert inside.wait(60)

    def release(self) -> None:
        self._released.set()
        for thread in self._threads:
            thread.join(60)

    def use(self) -> Client:
        with self.clients.use() as client:
            return client


def refused(call: Callable[[], object], match: str, *, transient: bool) -> None:
    with pytest.raises(LedgerError, match=match) as caught:
        call()
    assert caught.value.transient is transient


def test_one_client_serves_all_calls() -> None:
    made = Made()
    with made.clients.use() as first, made.clients.use() as second:
        assert first is second is made.use()
    assert len(made.all) == 1
    assert made.clients.close(1)
    assert made.clients.close(1)
    assert made.all[0].closed == 1
    refused(made.use, "closed", transient=False)


def test_a_client_that_hangs_is_replaced_and_closed_by_its_own_thread() -> None:
    made = Made()
    made.hang()
    hanging = made.all[0]
    made.clients.replace(time.monotonic())
    assert made.clients.left(hanging)
    assert (made.clients.counts.replaced, made.clients.counts.left_behind) == (1, 1)
    assert made.use() is made.all[1]
    assert hanging.closed == 0
    made.release()
    assert hanging.closed == 1
    assert made.clients.counts.left_behind == 0
    assert made.clients.close(1)
    assert [each.closed for each in made.all] == [1, 1]


def test_only_the_client_of_the_call_is_replaced() -> None:
    made = Made()
    first, second = time.monotonic(), time.monotonic()
    made.hang()
    made.hang()
    made.clients.replace(first)  # the client was made after the call had begun
    assert made.clients.counts.replaced == 1
    assert made.use() is made.all[1]
    made.hang()
    made.clients.replace(second)  # it hung in the client given up just now
    assert not made.clients.left(made.all[1])
    made.release()
    assert [each.closed for each in made.all] == [1, 0]
    made.clients.replace(time.monotonic())  # without a call nothing hangs
    assert made.clients.counts.replaced == 1


def test_consecutive_replacements_wait_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(clients.time, "monotonic", lambda: now)
    made = Made(pause=1.0)
    waits = []
    for _ in range(8):
        with made.clients.use() as client:
            made.clients.discard(client)
            made.clients.discard(client)  # no more than once
        refused(made.use, "a new one is made in", transient=True)
        before = now
        while True:
            try:
                with made.clients.use():
                    break
            except LedgerError:
                now += 0.5
        waits.append(now - before)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    made.clients.succeeded()
    with made.clients.use() as client:
        made.clients.discard(client)
    now += 1
    made.use()
    assert [each.closed for each in made.all] == [1] * 9 + [0]


def test_the_number_of_hanging_clients_is_bounded() -> None:
    made = Made()
    for _ in range(MOST_LEFT_BEHIND):
        made.hang()
        made.clients.replace(time.monotonic())
    refused(made.use, "8 clients hang", transient=True)
    assert len(made.all) == MOST_LEFT_BEHIND
    made.release()
    assert made.use() is made.all[-1]
    assert made.clients.counts.left_behind == 0


def test_close_waits_for_a_call_for_a_limited_time() -> None:
    made = Made()
    made.hang()
    started = time.monotonic()
    assert not made.clients.close(0.1)
    assert time.monotonic() - started < 30
    assert made.all[0].closed == 0
    made.release()
    assert made.all[0].closed == 1
    slow = Made()
    slow.hang()
    threading.Timer(0.1, slow.release).start()
    assert slow.clients.close(60)
    assert slow.all[0].closed == 1


def test_a_close_that_hangs_is_given_up() -> None:
    stuck = threading.Event()
    made = Clients(Client, lambda client: stuck.wait(60) and None)
    with made.use():
        pass
    assert not made.close(0.1)
    stuck.set()


def test_a_client_made_while_the_ledger_closes_is_closed() -> None:
    disposed: list[Client] = []

    def make() -> Client:
        found.close(1)
        return Client()

    found = Clients(make, disposed.append)
    with pytest.raises(LedgerError, match="closed"), found.use():
        pass
    assert len(disposed) == 1


def test_a_client_that_cannot_be_closed_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(client: Client) -> None:
        raise AssertionError("it still has packets")

    made = Clients(Client, fail, pause=0)
    with made.use() as client:
        made.discard(client)
    assert "still has packets" in caplog.text
