"""The adapter to TigerBeetle over a real server: conformance, and a server killed and paused under
load. Skipped without the program."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tigerbeetle as tb

from betrace.service.signals import Kind, Signal
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.packed import SIZE, PackedClient, event, pack
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger, accounts_of
from tests.support.ledger_conformance import LedgerConformance, OpenLedger, make
from tests.support.tigerbeetle_server import BATCH, CLUSTER, MISSING, PROGRAM, Server

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("tigerbeetle"))
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Server:
    running.start()
    return running


class Apart(PackedClient):
    """A client to whom the cluster seems empty: ids are changed by a number of the test's own."""

    def __init__(self, cluster_id: int, addresses: str, salt: int) -> None:
        super().__init__(cluster_id, addresses)
        self._salt = salt

    def create_accounts(self, accounts: list[tb.Account]) -> list[tb.CreateAccountResult]:
        return super().create_accounts([self._other(each) for each in accounts])

    def create_packed(self, transfers: bytes) -> list[int]:
        numbers = np.frombuffer(transfers, np.uint64).reshape(-1, SIZE // 8).copy()
        salt = np.frombuffer(self._salt.to_bytes(16, "little"), np.uint64)
        numbers[:, :6] ^= np.tile(salt, 3)  # the ids of the transfer and of its accounts
        return super().create_packed(numbers.tobytes())

    def lookup_accounts(self, accounts: list[int]) -> list[tb.Account]:
        found = super().lookup_accounts([each ^ self._salt for each in accounts])
        return [self._other(each) for each in found]

    def _other(self, account: tb.Account) -> tb.Account:
        return replace(account, id=account.id ^ self._salt)


@pytest.fixture
def open_ledger(server: Server, tmp_path: Path) -> Iterator[OpenLedger]:
    opened = []
    connect = partial(Apart, salt=secrets.randbits(128))

    def open_it(batch: int = BATCH, name: str = "ledger") -> TigerBeetleLedger:
        journal = SqliteLedger(tmp_path / f"{name}.sqlite")
        ledger = TigerBeetleLedger(server.address, CLUSTER, journal, batch, 1, connect)
        opened.append(ledger)
        return ledger

    yield open_it
    for ledger in opened:
        ledger.close()


class TestConformance(LedgerConformance):
    @pytest.fixture
    def open_ledger(self, open_ledger: OpenLedger) -> OpenLedger:
        return open_ledger


def test_packed_transfers_are_those_of_the_client(server) -> None:
    """A signal sent again, packed or as an object of the client, is the transfer already there."""
    client = PackedClient(CLUSTER, server.address)
    first = secrets.randbits(100)
    signals = [make(first), make(first + 1, kind=Kind.RETRACTED), make(first + 2, "r2", "größer")]
    created, exists = tb.CreateTransferStatus.CREATED, tb.CreateTransferStatus.EXISTS
    for tenant, rule in (("shop", "r1"), ("größer", "r2")):
        client.create_accounts(list(accounts_of(tenant, rule)))
    assert client.create_packed(pack(signals)) == [created] * 3
    assert [each.status for each in client.create_transfers([*map(event, signals)])] == [exists] * 3
    assert client.create_packed(pack(signals[:1])) == [exists]
    client.close()


def test_two_nodes_record_the_same_signals_at_once(server, open_ledger) -> None:
    """Each finds every signal new for itself, and the cluster has each once."""
    ledgers = [open_ledger(name=name) for name in ("one", "two", "three")]
    batches = [[make(n * 50 + i, f"r{n % 7}") for i in range(50)] for n in range(20)]
    failed: list[BaseException] = []

    def run(ledger: TigerBeetleLedger, order: list[int]) -> None:
        try:
            for n in order:
                later = [replace(s, detected_at=s.detected_at + n, message="x") for s in batches[n]]
                assert ledger.record(later) == [True] * 50
        except BaseException as error:
            failed.append(error)

    orders = (range(20), range(19, -1, -1), [*range(10, 20), *range(10)])
    threads = [
        threading.Thread(target=run, args=(ledger, list(order)))
        for ledger, order in zip(ledgers, orders, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    for ledger in ledgers:
        assert ledger.count("shop") == 1000
        assert ledger.balances("shop") == {f"r{n}": 150 if n < 6 else 100 for n in range(7)}


def test_a_request_too_large_names_the_setting(open_ledger) -> None:
    ledger = open_ledger(8189)
    with pytest.raises(LedgerError, match="batch_transfers") as caught:
        ledger.record([make(i) for i in range(300)])
    assert not caught.value.transient
    assert ledger.record([make(i) for i in range(200)]) == [True] * 200


class Load:
    """Records batch after batch in a thread as the store does: what fails or takes too long is
    given up, and tried again."""

    def __init__(self, ledger: TigerBeetleLedger, timeout: float) -> None:
        self.signals: list[Signal] = []
        self.told_new = 0
        self.left_behind = 0
        self.permanent = 0
        self._ledger = ledger
        self._timeout = timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            batch = [make(number + i, f"r{i % 5}") for i in range(40)]
            batch += [make(number + i, f"r{i % 5}", kind=Kind.RETRACTED) for i in range(10)]
            number += 40
            while (new := self._record(batch)) is None:
                time.sleep(0.05)
            self.told_new += sum(new)
            self.signals += batch

    def _record(self, batch: list[Signal]) -> list[bool] | None:
        answers: list[list[bool]] = []

        def call() -> None:
            try:
                answers.append(self._ledger.record(batch))
            except LedgerError as error:
                self.permanent += not error.transient

        began = time.monotonic()
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            self._ledger.replace(began)
            self.left_behind += 1
            return None
        return answers[0] if answers else None

    def until(self, count: int) -> None:
        """Return when so many more signals are recorded."""
        goal, deadline = len(self.signals) + count, time.monotonic() + 60
        while len(self.signals) < goal:
            assert time.monotonic() < deadline, "nothing is recorded any more"
            time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


def check(load: Load, ledger: TigerBeetleLedger) -> None:
    """The cluster, the journal and what was acknowledged agree, exactly once each."""
    assert load.permanent == 0
    assert load.told_new == len(load.signals) == ledger.count("shop")
    expected = dict.fromkeys((f"r{i}" for i in range(5)), 0)
    for signal in load.signals:
        expected[signal.rule_id] += 1 if signal.kind is Kind.RAISED else -1
    assert ledger.balances("shop") == expected
    assert ledger.outgoing() == []
    entries, after = [], 0
    while page := ledger.entries("shop", after):
        after = page[-1][0]
        entries += [signal.id for _, signal in page]
    assert sorted(entries) == sorted(signal.id for signal in load.signals)


@pytest.mark.parametrize(
    "timeout",
    [
        pytest.param(1.5, id="replaced"),
        pytest.param(30.0, id="the same client", marks=pytest.mark.slow),
    ],
)
def test_a_server_killed_under_load_loses_nothing(server, open_ledger, timeout) -> None:
    ledger = open_ledger()
    ledger._clients.pause = 0.1
    ledger.start(5)
    load = Load(ledger, timeout)
    for _ in range(2):
        load.until(100)
        server.kill()
        time.sleep(2)
        server.start()
    load.until(100)
    load.stop()
    check(load, ledger)
    assert ledger.clients.replaced == load.left_behind
    assert bool(load.left_behind) is (timeout < 2)


def test_a_server_paused_under_load_loses_nothing(server, open_ledger) -> None:
    ledger = open_ledger()
    ledger._clients.pause = 0.1
    ledger.start(5)
    load = Load(ledger, 1.5)
    for _ in range(2):
        load.until(100)
        server.pause()
        time.sleep(2.5)
        server.resume()
    load.until(100)
    load.stop()
    assert load.left_behind
    check(load, ledger)
    until = time.monotonic() + 10
    while ledger.clients.left_behind and time.monotonic() < until:
        time.sleep(0.05)
    assert ledger.clients.left_behind == 0  # the calls came back, and closed their clients


def test_a_new_process_sends_outgoing_signals_of_the_old_one(server, open_ledger) -> None:
    first = open_ledger()
    first.record([make(1)])
    server.pause()
    thread = threading.Thread(target=first.record, args=([make(2)],))
    thread.start()
    while not first.outgoing():
        time.sleep(0.02)
    second = open_ledger()
    second._clients.pause = 0
    second.start(0.2)  # it does not answer
    server.resume()
    thread.join(60)
    assert second.record([make(3)]) == [True]
    assert second.balance("shop", "r1") == second.count("shop") == 3


def test_sessions_run_out_only_after_many_clients(server, open_ledger) -> None:
    """A server keeps 64 sessions and evicts the oldest: its client is replaced, nothing is lost."""
    oldest = open_ledger()
    oldest._clients.pause = 0
    oldest.record([make(0)])

    def come_and_go(count: int) -> None:
        for _ in range(count):
            client = tb.ClientSync(CLUSTER, server.address)
            client.lookup_accounts([1])
            client.close()

    threads = [threading.Thread(target=come_and_go, args=(5,)) for _ in range(13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with pytest.raises(LedgerError, match="evicted") as caught:
        oldest.record([make(1)])
    assert caught.value.transient
    assert oldest.record([make(1)]) == [True]
    assert oldest.balance("shop", "r1") == 2
    assert oldest.clients.replaced == 1


@pytest.mark.parametrize("away", ["paused", "killed"])
def test_a_process_ends_though_its_client_hangs(server, tmp_path, away) -> None:
    number = secrets.randbits(40)
    program = f"""
import sys, threading, time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger
from tests.support.ledger_conformance import make
ledger = TigerBeetleLedger({server.address!r}, {CLUSTER}, SqliteLedger(Path(sys.argv[1])),
                           {BATCH}, close_seconds=0.5)
print(ledger.record([make({number})]), flush=True)
input()
threading.Thread(target=ledger.record, args=([make({number + 1})],), daemon=True).start()
time.sleep(0.3)
ledger.close()
print("closed", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "other.sqlite"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[True]\n"
        if away == "paused":
            server.pause()
        else:
            server.kill()
        out, _ = process.communicate("\n", timeout=20)
        assert out == "closed\n"
        assert process.returncode == 0
    if away == "paused":
        server.resume()
