"""The adapter to TigerBeetle over a cluster in memory, whose clients fail as the tests say."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tigerbeetle as tb
from tigerbeetle.bindings import InitStatus
from tigerbeetle.client import InitError

from betrace.service.signals import Kind
from betrace.service.storage.ledger.base import (
    LedgerError,
    RefusedError,
    ledger_number,
    rule_account,
    tenant_account,
)
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger
from tests.support.fake_tigerbeetle import Cluster
from tests.support.ledger_conformance import LedgerConformance, OpenLedger, make


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def open_ledger(cluster: Cluster, tmp_path: Path) -> Iterator[OpenLedger]:
    opened = []

    def open_it(batch: int = 8189, close_seconds: float = 0.2) -> TigerBeetleLedger:
        ledger = TigerBeetleLedger(
            "127.0.0.1:3000",
            0,
            SqliteLedger(tmp_path / "ledger.sqlite"),
            batch,
            close_seconds=close_seconds,
            connect=cluster.connect,
        )
        ledger._clients.pause = 0
        opened.append(ledger)
        return ledger

    yield open_it
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger) -> TigerBeetleLedger:
    return open_ledger()


class TestConformance(LedgerConformance):
    @pytest.fixture
    def open_ledger(self, open_ledger: OpenLedger) -> OpenLedger:
        return open_ledger


def test_a_signal_is_a_transfer_that_follows_from_its_id(ledger, cluster) -> None:
    signal = make(0xABC)
    ledger.record([signal])
    (found,) = cluster.transfers.values()
    assert found.id == int(signal.id, 16)
    assert (found.debit_account_id, found.credit_account_id) == (
        rule_account("shop", "r1"),
        tenant_account("shop"),
    )
    assert (found.amount, found.code, found.ledger) == (1, 1, ledger_number("shop"))
    assert (found.user_data_128, found.user_data_64, found.user_data_32) == (0xABC, 0, 0)
    tenant, rule = (
        cluster.accounts[i] for i in (tenant_account("shop"), rule_account("shop", "r1"))
    )
    assert (tenant.code, rule.code) == (1, 2)
    assert tenant.user_data_128 == rule.user_data_128 == tenant.id
    ledger.record([make(0xABC, kind=Kind.RETRACTED)])
    assert [each.code for each in cluster.transfers.values()] == [1, 2]


def test_accounts_come_first_and_once_for_a_client(ledger, cluster) -> None:
    ledger.record([make(1), make(2, "r2")])
    ledger.record([make(3)])
    assert cluster.requests == [
        ("create_accounts", 3),
        ("create_transfers", 2),
        ("create_transfers", 1),
    ]
    assert not cluster.failed


def test_the_accounts_remembered_are_bounded(ledger, cluster, monkeypatch) -> None:
    monkeypatch.setattr("betrace.service.storage.ledger.tigerbeetle._KNOWN_ACCOUNTS", 3)
    for number in range(4):
        ledger.record([make(number, f"r{number}")])
    assert [size for name, size in cluster.requests if name == "create_accounts"] == [2, 1, 1, 2]
    assert ledger.balances("shop") == {f"r{number}": 1 for number in range(4)}


def test_requests_are_no_larger_than_configured(open_ledger, cluster) -> None:
    cluster.batch = 253
    ledger = open_ledger(batch=253)
    signals = [make(i, f"r{i}") for i in range(600)]
    assert all(ledger.record(signals))
    assert [size for name, size in cluster.requests] == [253, 253, 95, 253, 253, 94]
    assert sum(ledger.balances("shop").values()) == 600


def test_a_request_too_large_names_the_setting(ledger, cluster) -> None:
    cluster.batch = 253
    with pytest.raises(LedgerError, match=r"lower ledger\.tigerbeetle\.batch_transfers") as caught:
        ledger.record([make(i) for i in range(300)])
    assert not caught.value.transient
    assert "253" in ledger.problem
    ledger.record([make(1)])
    assert ledger.problem is None


def test_one_refused_event_does_not_lose_the_others(ledger, cluster) -> None:
    cluster.failed.add(int(make(2).id, 16))
    with pytest.raises(
        RefusedError, match="refuses 2 signals: transfer: ID_ALREADY_FAILED"
    ) as caught:
        ledger.record([make(1), make(2), make(3), make(2)])
    assert not caught.value.transient
    assert caught.value.new == [True, False, True, False]
    assert caught.value.refused == dict.fromkeys((1, 3), "transfer: ID_ALREADY_FAILED")
    assert ledger.balance("shop", "r1") == 2
    # It is not an entry and not on its way: nothing sends it again by itself.
    assert [s.trace_id for _, s in ledger.entries("shop")] == [make(i).trace_id for i in (1, 3)]
    assert ledger.outgoing() == []
    assert (ledger.count("shop"), ledger.tenants(), ledger.last_entry("shop")) == (2, ["shop"], 2)


def test_a_transfer_that_exists_with_other_values_is_refused(ledger, cluster) -> None:
    signal = make(1)
    other = tb.Transfer(id=int(signal.id, 16), amount=1)
    cluster.transfers[other.id] = other
    with pytest.raises(RefusedError, match="EXISTS_WITH_DIFFERENT_USER_DATA_64"):
        ledger.record([signal])


def test_without_its_account_a_signal_is_refused_before_its_id_is_used(ledger, cluster) -> None:
    cluster.accounts[rule_account("shop", "r2")] = tb.Account(
        id=rule_account("shop", "r2"), ledger=1, code=9
    )
    with pytest.raises(RefusedError, match="account: EXISTS_WITH_DIFFERENT_LEDGER") as caught:
        ledger.record([make(1), make(2, "r2")])
    assert caught.value.refused.keys() == {1}
    assert not cluster.failed
    assert len(cluster.transfers) == 1


def test_a_call_left_behind_is_unknown_and_sent_again(ledger, cluster) -> None:
    """The abandoned call is carried out; who sends the signals again finds them new."""
    ledger.record([make(0)])
    go_on, inside = threading.Event(), threading.Event()
    errors: list[LedgerError] = []

    def hang() -> None:
        inside.set()
        go_on.wait(60)

    def abandoned() -> None:
        try:
            ledger.record([make(1), make(2)])
        except LedgerError as error:
            errors.append(error)

    cluster.script = iter([hang])
    began = time.monotonic()
    thread = threading.Thread(target=abandoned)
    thread.start()
    assert inside.wait(60)
    ledger.replace(began)
    assert ledger.clients.left_behind == 1
    assert [s.trace_id for _, s in ledger.outgoing()] == [make(i).trace_id for i in (1, 2)]
    assert ledger.record([make(3)]) == [True]  # a new client does not wait for the old
    go_on.set()
    thread.join(60)
    assert "left behind" in str(errors[0])
    assert errors[0].transient
    assert len(cluster.transfers) == 4  # it was carried out
    assert ledger.record([make(1), make(2)]) == [True, True]
    assert ledger.balance("shop", "r1") == len(cluster.transfers) == 4
    assert ledger.outgoing() == []
    assert (ledger.clients.left_behind, ledger.clients.replaced) == (0, 1)
    assert [client.closed for client in cluster.clients] == [True, False]


@pytest.mark.parametrize("error", [tb.ClientEvictedError(), tb.ClientClosedError()])
def test_a_client_that_is_dead_is_replaced(ledger, cluster, error) -> None:
    ledger.record([make(1)])
    cluster.script = iter([error])
    with pytest.raises(LedgerError, match="A new client is made") as caught:
        ledger.record([make(2)])
    assert caught.value.transient
    assert ledger.record([make(1), make(2)]) == [False, True]
    assert [client.closed for client in cluster.clients] == [True, False]
    # A new session knows nothing of the accounts.
    assert [name for name, _ in cluster.requests].count("create_accounts") == 2


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (tb.ClientReleaseTooLowError(), "too old: install the server's release"),
        (tb.ClientReleaseTooHighError(), "too new: upgrade the server"),
    ],
)
def test_another_release_is_fatal(ledger, cluster, error, text) -> None:
    cluster.script = iter([error])
    with pytest.raises(LedgerError, match=text) as caught:
        ledger.start(5)
    assert not caught.value.transient
    assert text in ledger.problem


def test_a_client_that_cannot_be_made_is_fatal(tmp_path) -> None:
    def connect(cluster_id: int, addresses: str) -> tb.ClientSync:
        raise InitError(InitStatus.ADDRESS_LIMIT_EXCEEDED)

    journal = SqliteLedger(tmp_path / "ledger.sqlite")
    ledger = TigerBeetleLedger("127.0.0.1:3000", 0, journal, connect=connect)
    with pytest.raises(LedgerError, match=r"ledger\.tigerbeetle\.addresses") as caught:
        ledger.record([make(1)])
    assert not caught.value.transient
    assert "addresses" in ledger.problem
    ledger.close()


def test_an_unreachable_cluster_does_not_prevent_the_start(ledger, cluster, caplog) -> None:
    released = threading.Event()
    cluster.script = iter([lambda: released.wait(60) and None])
    ledger.start(0.05)
    assert "did not answer within 0.05 s" in caplog.text
    assert ledger.clients.left_behind == 1
    released.set()
    assert ledger.record([make(1)]) == [True]


def test_a_transient_error_does_not_prevent_the_start(ledger, cluster, caplog) -> None:
    cluster.script = iter([tb.ClientEvictedError()])
    ledger.start(5)
    assert "does not work yet" in caplog.text


@pytest.mark.parametrize("carried_out", [False, True])
def test_outgoing_signals_are_sent_at_the_next_start(
    open_ledger, cluster, carried_out, caplog
) -> None:
    caplog.set_level("INFO", "service.ledger")
    first = open_ledger()
    first.record([make(0)])

    class Died(BaseException):
        pass

    def die() -> None:
        raise Died

    if carried_out:
        cluster.after = die
    else:
        cluster.script = iter([die])
    with pytest.raises(Died):
        first.record([make(1), make(2)])
    cluster.after = lambda: None
    assert len(cluster.transfers) == (3 if carried_out else 1)
    second = open_ledger()
    second.start(5)
    assert "2 outgoing signals were sent again" in caplog.text
    assert len(cluster.transfers) == second.count("shop") == second.balance("shop", "r1") == 3
    assert second.outgoing() == []
    assert second.record([make(1)]) == [False]


@pytest.mark.parametrize("hangs", [False, True])
def test_what_a_start_could_not_send_is_sent_without_a_new_signal(
    open_ledger, cluster, monkeypatch, hangs
) -> None:
    monkeypatch.setattr("betrace.service.storage.ledger.tigerbeetle._SEND_AGAIN_SECONDS", 0.02)
    ledger = open_ledger()
    ledger._journal.add_outgoing([make(1), make(2)])
    back = threading.Event()
    away = [lambda: back.wait(60) and None] if hangs else [tb.ClientEvictedError()] * 5
    cluster.script = iter(away)
    ledger.start(0.1 if hangs else 60)
    back.set()
    end = time.monotonic() + 60
    while ledger.outgoing():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ledger.balance("shop", "r1") == ledger.count("shop") == len(cluster.transfers) == 2


def test_the_next_start_need_not_find_the_cluster(open_ledger, cluster) -> None:
    first = open_ledger()
    cluster.script = iter([tb.ClientEvictedError()])
    with pytest.raises(LedgerError):
        first.record([make(1)])
    second = open_ledger()
    assert [signal for _, signal in second.outgoing()] == [make(1)]  # for who must know of it
    assert second.record([make(2)]) == [True]  # the first that reaches the cluster takes it along
    assert second.balance("shop", "r1") == 2


class TestSettling:
    """The journal is told what became of a batch when the batch's caller has gone on."""

    @pytest.fixture
    def settle(self, monkeypatch) -> Iterator[list[threading.Event]]:
        """Each settling waits for the next of these events, while there are any."""
        waits: list[threading.Event] = []
        real = SqliteLedger.settle

        def slow(journal, recorded, refused=()) -> None:
            if waits:
                waits.pop(0).wait(60)
            real(journal, recorded, refused)

        monkeypatch.setattr(SqliteLedger, "settle", slow)
        return waits

    @staticmethod
    def in_thread(call) -> tuple[threading.Thread, list[object]]:
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(call()))
        thread.start()
        return thread, answers

    @staticmethod
    def error_of(call, *arguments) -> LedgerError:
        with pytest.raises(LedgerError) as caught:
            call(*arguments)
        return caught.value

    def test_only_the_next_batch_waits_for_it(self, ledger, settle) -> None:
        gate = threading.Event()
        settle.append(gate)
        assert ledger.record([make(1)]) == [True]  # although it is not settled
        thread, answers = self.in_thread(lambda: ledger.record([make(1), make(2)]))
        thread.join(0.1)
        assert not answers
        gate.set()
        thread.join(60)
        assert answers == [[False, True]]
        assert (ledger.count("shop"), ledger.outgoing()) == (2, [])

    def test_readers_wait_for_it_briefly(self, ledger, settle, monkeypatch) -> None:
        gate = threading.Event()
        settle.append(gate)
        ledger.record([make(1)])
        monkeypatch.setattr(
            "betrace.service.storage.ledger.tigerbeetle._READERS_WAIT_SECONDS", 0.05
        )
        assert ledger.count("shop") == 0
        assert [signal for _, signal in ledger.outgoing()] == [make(1)]
        monkeypatch.setattr("betrace.service.storage.ledger.tigerbeetle._READERS_WAIT_SECONDS", 60)
        thread, answers = self.in_thread(lambda: ledger.count("shop"))
        gate.set()
        thread.join(60)
        assert answers == [1]

    def test_a_failed_batch_is_sent_again_before_anything_else(
        self, ledger, cluster, monkeypatch
    ) -> None:
        real = SqliteLedger.settle
        failing = iter([True, True])

        def settle(journal, recorded, refused=()) -> None:
            if next(failing, False):
                raise LedgerError("the disk is full", transient=True)
            real(journal, recorded, refused)

        monkeypatch.setattr(SqliteLedger, "settle", settle)
        assert ledger.record([make(1)]) == [True]
        with pytest.raises(LedgerError, match="the disk is full"):  # to settle what was left over
            ledger.record([make(2)])
        assert [signal for _, signal in ledger.outgoing()] == [make(1)]
        assert ledger.record([make(1), make(2)]) == [False, True]
        assert ledger.outgoing() == []
        assert ledger.balance("shop", "r1") == ledger.count("shop") == len(cluster.transfers) == 2

    def test_a_hanging_settlement_is_left_behind(self, ledger, cluster, settle) -> None:
        gate = threading.Event()
        settle.append(gate)
        assert ledger.record([make(1)]) == [True]
        began = time.monotonic()
        thread, answers = self.in_thread(lambda: self.error_of(ledger.record, [make(2)]))
        thread.join(0.5)  # it waits for the settling
        ledger.replace(began)  # who waits for the settling has given up
        assert ledger.record([make(3)]) == [True]
        assert ledger.count("shop") == 2  # what was left over was settled on the way
        gate.set()
        thread.join(60)
        assert "left behind" in str(answers[0])
        assert ledger.record([make(2)]) == [True]
        assert ledger.balance("shop", "r1") == ledger.count("shop") == 3
        assert ledger.outgoing() == []

    def test_is_over_when_the_ledger_is_closed(self, open_ledger, settle) -> None:
        gate = threading.Event()
        settle.append(gate)
        first = open_ledger(close_seconds=60)
        first.record([make(1)])
        threading.Timer(0.05, gate.set).start()
        first.close()
        assert open_ledger().outgoing() == []


def test_close_gives_up_a_call_that_hangs_and_never_closes_under_it(
    ledger, cluster, caplog
) -> None:
    released, inside = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        released.wait(60)

    def call() -> None:
        with pytest.raises(LedgerError):
            ledger.record([make(1)])

    cluster.script = iter([hang])
    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    started = time.monotonic()
    ledger.close()
    ledger.close()
    assert time.monotonic() - started < 30
    assert "hangs and was not closed" in caplog.text
    assert not cluster.clients[0].closed
    released.set()
    thread.join(60)
    assert cluster.clients[0].closed


def test_any_interleaving_of_failures_records_each_signal_once(open_ledger, cluster) -> None:
    """Every request fails once, before or after it was carried out, in all combinations."""
    ledger = open_ledger(batch=2)
    numbers = itertools.count()
    for faults in itertools.product(("none", "before", "after"), repeat=3):
        todo = list(faults)

        def after(todo: list[str] = todo) -> None:
            if (todo.pop(0) if todo else "none") == "after":
                raise tb.ClientEvictedError

        def before(todo: list[str] = todo) -> None:
            if todo and todo[0] == "before":
                todo.pop(0)
                raise tb.ClientEvictedError

        cluster.script, cluster.after = itertools.repeat(before), after
        first = next(numbers) * 10
        signals = [make(first + i) for i in range(3)]
        new: list[bool] = []
        for _ in range(10):
            try:
                new = ledger.record(signals)
            except LedgerError:
                continue
            break
        assert new == [True] * 3
    cluster.script, cluster.after = iter(()), lambda: None
    assert ledger.balance("shop", "r1") == len(cluster.transfers) == 27 * 3
    assert ledger.count("shop") == 27 * 3
    assert all(client.closed for client in cluster.clients[:-1])
