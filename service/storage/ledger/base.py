"""The ledger: the record of signals, as transfers of a double-entry ledger.

Each tenant and each of its rules has an account on the tenant's ledger. A raised signal is a
transfer of 1 from the rule's account to the tenant's (code 1), a retraction is the opposite
transfer (code 2). So a rule's balance is the number of its active signals. The id of a transfer is
the signal's id; a signal recorded twice is one transfer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Protocol

from betrace.service.signals import Kind, Signal

AMOUNT = 1
PAGE = 1000
"""Signals read at once."""
_ACCOUNTS_KEPT = 10_000
_RESERVED_IDS = (0, (1 << 128) - 1)  # TigerBeetle accepts neither


class Code(IntEnum):
    """What a transfer means."""

    RAISED = 1
    RETRACTED = 2


class LedgerError(Exception):
    """The ledger failed. If ``transient``, the same call may succeed later (and may have succeeded
    now: repeating it is safe); otherwise it never will."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class RefusedError(LedgerError):
    """The ledger will never accept some of the signals; the others are recorded. ``new`` is what
    :meth:`Ledger.record` would have returned, False for the refused ones; ``refused`` maps their
    indices to the reason."""

    def __init__(self, new: list[bool], refused: dict[int, str]) -> None:
        reasons = ", ".join(sorted(set(refused.values())))
        super().__init__(f"the ledger refuses {len(refused)} signals: {reasons}", transient=False)
        self.new = new
        self.refused = refused


@dataclass(slots=True)
class ClientCounts:
    """What happened to the clients of a ledger."""

    replaced: int = 0
    """Clients given up since the start."""
    left_behind: int = 0
    """Clients given up whose call has not returned yet."""


class LedgerEntries(Protocol):
    """The signals of a ledger, to read again. Methods block and raise :exc:`LedgerError`."""

    def tenants(self) -> list[str]:
        """The tenants that ever had a signal."""

    def count(self, tenant: str) -> int:
        """The number of the tenant's signals, retractions included."""

    def last_entry(self, tenant: str) -> int:
        """The number of the tenant's newest signal, 0 without any."""

    def entries(self, tenant: str, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """The tenant's signals numbered above ``after``, in order, each with its number."""

    def outgoing(self, after: int = 0, limit: int = PAGE) -> list[tuple[int, Signal]]:
        """Signals of all tenants, numbered above ``after``, for which the ledger does not know yet
        whether it has recorded them; it finds out by itself."""


class Ledger(LedgerEntries, Protocol):
    """The ledger of a service. Methods block, may be called from any thread, and raise
    :exc:`LedgerError`."""

    @property
    def kind(self) -> str:
        """Its name in the settings."""

    @property
    def problem(self) -> str | None:
        """What keeps it from working until somebody fixes it."""

    @property
    def clients(self) -> ClientCounts:
        """What happened to its clients."""

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        """Record signals durably; returns for each whether it is new. A signal whose id is already
        recorded changes nothing. After an error none of them is recorded, as far as the ledger can
        tell; :exc:`RefusedError` is the exception."""

    def balance(self, tenant: str, rule_id: str) -> int:
        """The number of active signals of a rule: raised minus retracted; 0 for an unknown rule."""

    def balances(self, tenant: str) -> dict[str, int]:
        """By rule id, the balance of each of the tenant's rules that ever raised a signal."""

    def replace(self, since: float) -> None:
        """Use another client from now on, because a call that began at ``since``
        (``time.monotonic``) was left behind. What that call did is unknown; the same signals may be
        recorded again. Does not block."""

    def close(self) -> None:
        """Close the ledger, after a few seconds even if a call hangs. Idempotent; any other call
        afterwards is an error."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A signal as its transfer. Ids are 128-bit integers."""

    id: int
    debit_account: int
    credit_account: int
    ledger: int
    code: Code


def _hash(*parts: str) -> bytes:
    """SHA-256 over the parts, each preceded by its length so that different tuples never join to
    the same text."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).digest()


@lru_cache(maxsize=_ACCOUNTS_KEPT)
def ledger_number(tenant: str) -> int:
    """The number of the tenant's ledger, 1 to 2**32-1. Two tenants may share a number, but never an
    account."""
    return int.from_bytes(_hash("ledger", tenant)[:4], "little") or 1


@lru_cache(maxsize=_ACCOUNTS_KEPT)
def tenant_account(tenant: str) -> int:
    """The id of the tenant's account."""
    return int.from_bytes(_hash("tenant", tenant)[:16], "big")


@lru_cache(maxsize=_ACCOUNTS_KEPT)
def rule_account(tenant: str, rule_id: str) -> int:
    """The id of the account of a tenant's rule."""
    return int.from_bytes(_hash("rule", tenant, rule_id)[:16], "big")


def transfer_id(signal_id: str) -> int:
    """The id of the signal's transfer: its 32 hex digits as an integer. Raises a permanent
    :exc:`LedgerError` for an invalid id."""
    try:
        number = int.from_bytes(bytes.fromhex(signal_id), "big")
    except ValueError:
        number = 0
    if len(signal_id) != 32 or number in _RESERVED_IDS:
        raise LedgerError(
            f"signal id {signal_id!r} is not 32 hex digits other than all zeros or all ones",
            transient=False,
        )
    return number


def transfer(signal: Signal) -> Transfer:
    """The transfer that records ``signal``."""
    rule = rule_account(signal.tenant, signal.rule_id)
    tenant = tenant_account(signal.tenant)
    raised = signal.kind is Kind.RAISED
    return Transfer(
        transfer_id(signal.id),
        debit_account=rule if raised else tenant,
        credit_account=tenant if raised else rule,
        ledger=ledger_number(signal.tenant),
        code=Code.RAISED if raised else Code.RETRACTED,
    )
