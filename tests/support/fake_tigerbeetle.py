"""A TigerBeetle cluster in memory, and clients that follow a test's script.

It has the rules that matter to the adapter: a refused id is refused for ever, a transfer needs its
accounts, a repetition must be identical, and a request may be too large.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import tigerbeetle as tb

A, T = tb.CreateAccountStatus, tb.CreateTransferStatus


@dataclass
class Cluster:
    """The state, and the clients that were made. For each call of a client, ``script`` yields an
    exception to raise, or a function to call first, which may block."""

    batch: int = 8189
    accounts: dict[int, tb.Account] = field(default_factory=dict)
    transfers: dict[int, tb.Transfer] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    clients: list[ScriptedClient] = field(default_factory=list)
    requests: list[tuple[str, int]] = field(default_factory=list)
    script: Iterator[Exception | Callable[[], None] | None] = field(
        default_factory=lambda: iter(())
    )
    after: Callable[[], None] = field(default=lambda: None)
    """Called after a request was carried out and before its answer."""
    lock: Any = field(default_factory=threading.RLock)

    def connect(self, cluster_id: int, addresses: str) -> ScriptedClient:
        client = ScriptedClient(self)
        self.clients.append(client)
        return client

    def create_account(self, account: tb.Account) -> A:
        known = self.accounts.get(account.id)
        if known is None:
            self.accounts[account.id] = account
            return A.CREATED
        return A.EXISTS if known.ledger == account.ledger else A.EXISTS_WITH_DIFFERENT_LEDGER

    def create_transfer(self, transfer: tb.Transfer) -> T:
        known = self.transfers.get(transfer.id)
        if known is not None:
            return T.EXISTS if known == transfer else T.EXISTS_WITH_DIFFERENT_USER_DATA_64
        if transfer.id in self.failed:
            return T.ID_ALREADY_FAILED
        debit = self.accounts.get(transfer.debit_account_id)
        credit = self.accounts.get(transfer.credit_account_id)
        if debit is None or credit is None:
            self.failed.add(transfer.id)
            return T.DEBIT_ACCOUNT_NOT_FOUND if debit is None else T.CREDIT_ACCOUNT_NOT_FOUND
        debit.debits_posted += transfer.amount
        credit.credits_posted += transfer.amount
        self.transfers[transfer.id] = transfer
        return T.CREATED


class ScriptedClient:
    """``tigerbeetle.ClientSync`` on a :class:`Cluster`. Closing it twice or during a call is an
    error."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.running = 0
        self.closed = False

    def create_accounts(self, accounts: list[tb.Account]) -> list[Any]:
        return self._call("create_accounts", accounts, self._cluster.create_account)

    def create_transfers(self, transfers: list[tb.Transfer]) -> list[Any]:
        return self._call("create_transfers", transfers, self._cluster.create_transfer)

    def lookup_accounts(self, accounts: list[int]) -> list[tb.Account]:
        found = self._call("lookup_accounts", accounts, self._cluster.accounts.get)
        return [each.status for each in found if each.status is not None]

    def close(self) -> None:
        assert not self.closed, "closed twice"
        assert not self.running, "closed while a call runs"
        self.closed = True

    def _call(self, name: str, events: list[Any], one: Callable[[Any], Any]) -> list[Any]:
        assert not self.closed, "used after it was closed"
        assert events, "an empty request"
        cluster = self._cluster
        cluster.requests.append((name, len(events)))
        with cluster.lock:
            self.running += 1
        try:
            fault = next(cluster.script, None)
            if isinstance(fault, Exception):
                raise fault
            if fault is not None:
                fault()
            if len(events) > cluster.batch:
                raise tb.TooMuchDataError
            with cluster.lock:
                answers = [SimpleNamespace(status=one(event)) for event in events]
            cluster.after()
            return answers
        finally:
            with cluster.lock:
                self.running -= 1
