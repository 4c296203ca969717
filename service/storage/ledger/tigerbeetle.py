"""The ledger in TigerBeetle, with a journal of the whole signals beside it.

A transfer can hold ids but no message or evidence, so signals are also kept in a local file
(:class:`betrace.service.storage.ledger.sqlite.SqliteLedger`), from which they are read again. A
batch is first stored there as outgoing, then sent, then settled there, for which only the next
batch waits. A process that crashes in between finds the batch outgoing at its next start and sends
it again; ids make that harmless. TigerBeetle's client has no timeout and a call cannot be
cancelled, so a caller that gives up (:meth:`TigerBeetleLedger.replace`) does not know what the call
did, and sends the same events again with another client.

Protocol and limits: https://docs.tigerbeetle.com, "Reliable Transaction Submission".
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import compress
from queue import SimpleQueue
from typing import TypeVar

import tigerbeetle as tb
from tigerbeetle.client import InitError

from betrace.service.signals import Signal
from betrace.service.storage.ledger import packed
from betrace.service.storage.ledger.base import (
    AMOUNT,
    PAGE,
    ClientCounts,
    LedgerError,
    RefusedError,
    ledger_number,
    rule_account,
    tenant_account,
)
from betrace.service.storage.ledger.clients import Clients
from betrace.service.storage.ledger.sqlite import SqliteLedger

T = TypeVar("T")

_log = logging.getLogger("service.ledger")
# Clients log every attempt to connect; the service logs what matters.
logging.getLogger("tigerbeetle").setLevel(logging.ERROR)

TENANT, RULE = 1, 2
"""Codes of accounts."""
MOST_TRANSFERS = 8189
"""Transfers in one request of 1 MiB."""
_KNOWN_ACCOUNTS = 100_000
_READERS_WAIT_SECONDS = 1.0
_REPORT_EVERY = 50 * PAGE
_SEND_AGAIN_SECONDS = 5.0
_MADE = (tb.CreateAccountStatus.CREATED, tb.CreateAccountStatus.EXISTS)
_DONE = {tb.CreateTransferStatus.CREATED, tb.CreateTransferStatus.EXISTS}


@dataclass(eq=False, slots=True)
class _Session:
    """A client, a lock for its only writer, and the accounts that are known to exist."""

    client: tb.ClientSync
    writing: threading.Lock = field(default_factory=threading.Lock)
    accounts: set[int] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Settling:
    """A batch that the journal is to settle."""

    recorded: list[Signal]
    refused: list[Signal]
    done: threading.Event = field(default_factory=threading.Event)
    error: LedgerError | None = None


class _Settler:
    """A thread that settles batches in the journal, one at a time. There is one thread, not one per
    batch, because starting a thread waits for it to run and then for the interpreter's lock."""

    def __init__(self, journal: SqliteLedger) -> None:
        self._journal = journal
        self._queue: SimpleQueue[_Settling | None] = SimpleQueue()
        threading.Thread(target=self._run, name="journal", daemon=True).start()

    def put(self, settling: _Settling) -> None:
        self._queue.put(settling)

    def stop(self) -> None:
        """Stop the thread after the batches it already has."""
        self._queue.put(None)

    def _run(self) -> None:
        while (settling := self._queue.get()) is not None:
            try:
                self._journal.settle(settling.recorded, settling.refused)
            except LedgerError as error:
                settling.error = error
            except Exception as error:  # the next batch waits for it
                settling.error = LedgerError(f"the journal: {error!r}", transient=True)
            settling.done.set()
            del settling


class TigerBeetleLedger:
    """A :class:`betrace.service.storage.ledger.base.Ledger` in a TigerBeetle cluster.

    Args:
      addresses: of the replicas, ``ip:port``, separated by commas.
      cluster_id: the number with which the cluster was formatted.
      journal: keeps the whole signals; closed with the ledger.
      batch: the most transfers in one request; 253 for a server with ``--development``.
      close_seconds: how long :meth:`close` waits.
      connect: makes a client.
    """

    kind = "tigerbeetle"

    def __init__(
        self,
        addresses: str,
        cluster_id: int,
        journal: SqliteLedger,
        batch: int = MOST_TRANSFERS,
        close_seconds: float = 5.0,
        connect: Callable[[int, str], tb.ClientSync] | None = None,
    ) -> None:
        self._addresses = addresses
        self._cluster = cluster_id
        self._journal = journal
        self._batch = batch
        self._close_seconds = close_seconds
        self._connect = connect or packed.connect
        self._sent_again = 0  # outgoing signals
        self._left_over = True  # outgoing signals may need to be sent again
        self._settling: _Settling | None = None
        self._settler = _Settler(journal)
        self._lock = threading.Lock()  # of these three; held only for moments
        self.problem: str | None = None
        """See :attr:`betrace.service.storage.ledger.base.Ledger.problem`."""
        self._clients = Clients(self._open, lambda session: session.client.close())

    @property
    def clients(self) -> ClientCounts:
        """See :attr:`betrace.service.storage.ledger.base.Ledger.clients`."""
        return self._clients.counts

    def start(self, seconds: float) -> None:
        """Connect to the server and send what the last process left outgoing. Returns when that is
        done, or nothing was sent for ``seconds``. Raises :exc:`LedgerError` if the server answers
        that this can never work; an unreachable server is only logged."""
        failed: list[LedgerError] = []
        began = time.monotonic()
        thread = threading.Thread(target=self._try_start, args=(failed,), daemon=True)
        thread.start()
        sent = -1
        while thread.is_alive() and sent != self._sent_again:  # after a rebuild, all are
            sent = self._sent_again
            thread.join(seconds)
        if thread.is_alive():
            self.replace(began)
            _log.warning(
                "TigerBeetle at %s did not answer within %g s; signals wait in local files: check "
                "that it runs, its addresses, and that the cluster's id is %d",
                self._addresses,
                seconds,
                self._cluster,
            )
        for error in failed:
            if not error.transient:
                raise error
            _log.warning("TigerBeetle at %s does not work yet: %s", self._addresses, error)
        if self._left_over:
            threading.Thread(target=self._send_later, name="outgoing", daemon=True).start()

    def _send_later(self) -> None:
        """Send what the start could not send, also if no new signal comes."""
        while self._left_over:
            time.sleep(_SEND_AGAIN_SECONDS)
            try:
                self.record([])
            except LedgerError as error:
                if not error.transient:  # it is closed, or somebody must fix something
                    return

    def _try_start(self, failed: list[LedgerError]) -> None:
        try:
            with self._using() as session:
                session.client.lookup_accounts([1])
            self.record([])
        except LedgerError as error:
            failed.append(error)

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.record`. After a transient error it
        is unknown which signals are recorded; each counts as new the first time this returns."""
        with self._using() as session, session.writing:
            with suppress(LedgerError):  # then outgoing signals are sent again
                self._settled()
            if self._left_over:
                self._send_left_over(session)
            new = self._journal.add_outgoing(signals)
            reasons = self._post(session, list(compress(signals, new)))
        if not reasons:
            return new
        refused = {i: reasons[s.id] for i, s in enumerate(signals) if s.id in reasons}
        raise RefusedError([n and i not in refused for i, n in enumerate(new)], refused)

    def _send_left_over(self, session: _Session) -> None:
        sent = after = 0
        while page := self._journal.outgoing(after, PAGE):
            after = page[-1][0]
            self._post(session, [signal for _, signal in page])
            self._clients.succeeded()
            sent += len(page)
            self._sent_again += len(page)
            if sent % _REPORT_EVERY == 0:
                _log.info("%d outgoing signals were sent again so far", sent)
        self._settled()
        with self._lock:
            self._left_over = self._clients.left(session)
        if sent:
            _log.info("%d outgoing signals were sent again", sent)

    def _settled(self, seconds: float | None = None) -> None:
        """Wait up to ``seconds`` until the journal has settled all batches. Raises its error once
        if it failed; outgoing signals are then sent again before anything else."""
        settling = self._settling
        if settling is None:
            return
        settling.done.wait(seconds)
        with self._lock:
            if not settling.done.is_set() or self._settling is not settling:
                return
            self._settling = None
            self._left_over |= settling.error is not None
        if settling.error is not None:
            raise settling.error

    def _post(self, session: _Session, signals: list[Signal]) -> dict[str, str]:
        """Send outgoing signals and settle them. Returns by id why some were refused."""
        refused = self._create_accounts(session, signals)
        sent = [signal for signal in signals if signal.id not in refused]
        for some in _chunks(sent, self._batch):
            statuses = packed.create_transfers(session.client, some)
            if not _DONE.issuperset(statuses):
                for signal, status in zip(some, statuses, strict=True):
                    if status not in _DONE:
                        refused[signal.id] = f"transfer: {packed.status_name(status)}"
        if signals:
            if self._clients.left(session):
                # The caller gave up and sends them again; they are settled then, as new.
                raise LedgerError("the call was left behind", transient=True)
            self._settled()
            never = [signal for signal in signals if signal.id in refused]
            recorded = [signal for signal in sent if signal.id not in refused]
            with self._lock:
                self._settling = _Settling(recorded, never)
                self._settler.put(self._settling)
        for reason in set(refused.values()):
            _log.error("TigerBeetle permanently refuses signals: %s", reason)
        return refused

    def _create_accounts(self, session: _Session, signals: list[Signal]) -> dict[str, str]:
        """Create missing accounts: TigerBeetle refuses a transfer without accounts, and its id for
        ever after. Returns by signal id why some cannot have accounts."""
        accounts: dict[int, tb.Account] = {}
        for tenant, rule_id in {(signal.tenant, signal.rule_id) for signal in signals}:
            for account in accounts_of(tenant, rule_id):
                if account.id not in session.accounts:
                    accounts.setdefault(account.id, account)
        failed: dict[int, str] = {}
        for some in _chunks(list(accounts.values()), self._batch):
            results = session.client.create_accounts(some)
            for account, result in zip(some, results, strict=True):
                if result.status not in _MADE:
                    failed[account.id] = f"account: {result.status.name}"
        if len(session.accounts) + len(accounts) > _KNOWN_ACCOUNTS:
            session.accounts.clear()
        session.accounts.update(accounts.keys() - failed.keys())
        if not failed:
            return {}
        return {
            signal.id: failed[account]
            for signal in signals
            for account in (
                tenant_account(signal.tenant),
                rule_account(signal.tenant, signal.rule_id),
            )
            if account in failed
        }

    def balance(self, tenant: str, rule_id: str) -> int:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.balance`. Counts every service that
        writes to the cluster."""
        return self._balances([rule_account(tenant, rule_id)]).get(rule_account(tenant, rule_id), 0)

    def balances(self, tenant: str) -> dict[str, int]:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.balances`. Has the rules that
        raised a signal here, and counts every service that writes to the cluster."""
        accounts = {rule: rule_account(tenant, rule) for rule in self._read().balances(tenant)}
        found = self._balances(list(accounts.values()))
        return {rule: found.get(account, 0) for rule, account in accounts.items()}

    def _balances(self, accounts: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        with self._using() as session:
            for some in _chunks(accounts, self._batch):
                for account in session.client.lookup_accounts(some):
                    posted = account.debits_posted - account.credits_posted
                    found[account.id] = posted // AMOUNT
        return found

    # LedgerEntries, read from the journal

    def tenants(self) -> list[str]:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._read().tenants()

    def count(self, tenant: str) -> int:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._read().count(tenant)

    def last_entry(self, tenant: str) -> int:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._read().last_entry(tenant)

    def entries(self, tenant: str, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._read().entries(tenant, after, limit)

    def outgoing(self, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """See :class:`betrace.service.storage.ledger.base.LedgerEntries`."""
        return self._read().outgoing(after, limit)

    def _read(self) -> SqliteLedger:
        """The journal, with all batches settled unless it hangs."""
        with suppress(LedgerError):
            self._settled(_READERS_WAIT_SECONDS)
        return self._journal

    # Clients

    def replace(self, since: float) -> None:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.replace`."""
        with self._lock:
            if self._settling is not None and not self._settling.done.is_set():
                self._settling = None  # the settler may be what hangs
                self._settler.stop()
                self._settler = _Settler(self._journal)
                self._left_over = True
        self._clients.replace(since)
        self._journal.replace(since)

    def close(self) -> None:
        """See :meth:`betrace.service.storage.ledger.base.Ledger.close`."""
        if not self._clients.close(self._close_seconds):
            _log.warning("TigerBeetle's client hangs and was not closed")
        with suppress(LedgerError):  # outgoing signals are sent at the next start
            self._settled(self._close_seconds)
        self._settler.stop()
        self._journal.close()

    def _open(self) -> _Session:
        try:
            return _Session(self._connect(self._cluster, self._addresses))
        except InitError as error:
            self.problem = (
                f"TigerBeetle's client cannot be made ({error}): check "
                "ledger.tigerbeetle.addresses and the system's limits"
            )
            raise LedgerError(self.problem, transient=False) from error

    @contextmanager
    def _using(self) -> Iterator[_Session]:
        """The session for one call; raises its errors as :exc:`LedgerError`."""
        with self._clients.use() as session:
            try:
                yield session
            except (tb.ClientReleaseTooLowError, tb.ClientReleaseTooHighError) as error:
                self._clients.discard(session)
                low = isinstance(error, tb.ClientReleaseTooLowError)
                self.problem = (
                    f"TigerBeetle at {self._addresses} refuses this client: its release "
                    f"{importlib.metadata.version('tigerbeetle')} is too "
                    f"{'old' if low else 'new'}: "
                    + (
                        "install the server's release of the Python package tigerbeetle"
                        if low
                        else "upgrade the server, or install its release of the Python package "
                        "tigerbeetle"
                    )
                )
                raise LedgerError(self.problem, transient=False) from error
            except tb.TooMuchDataError as error:
                self.problem = (
                    f"TigerBeetle accepts fewer than {self._batch} transfers at once: lower "
                    "ledger.tigerbeetle.batch_transfers (253 with --development)"
                )
                raise LedgerError(self.problem, transient=False) from error
            except (tb.ClientEvictedError, tb.ClientClosedError) as error:
                self._clients.discard(session)
                raise LedgerError(
                    f"TigerBeetle: {error} A new client is made.", transient=True
                ) from error
            else:
                self.problem = None
                self._clients.succeeded()


def accounts_of(tenant: str, rule_id: str) -> Iterable[tb.Account]:
    """The accounts of a tenant and of its rule."""
    owner, ledger = tenant_account(tenant), ledger_number(tenant)
    rule = rule_account(tenant, rule_id)
    yield tb.Account(id=owner, ledger=ledger, code=TENANT, user_data_128=owner)
    yield tb.Account(id=rule, ledger=ledger, code=RULE, user_data_128=owner)


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
