"""The ledger: the record of signals, as transfers of a double-entry ledger.

Each tenant has an account, and so has each of its rules, on the tenant's ledger. A raised
signal is a transfer of 1 from the rule's account to the tenant's (code 1), a retraction the
opposite transfer (code 2), so a rule's balance is how many of its signals hold. The id of a
transfer is the signal's id; a signal that is recorded twice is one transfer.
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
_ACCOUNTS_KEPT = 10_000
_RESERVED_IDS = (0, (1 << 128) - 1)  # TigerBeetle takes neither


class Code(IntEnum):
    """What a transfer says."""

    RAISED = 1
    RETRACTED = 2


class LedgerError(Exception):
    """The ledger did not do it. Where ``transient`` the same call may work later (and may have
    worked now: sending it again is safe); else it never will."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class RefusedError(LedgerError):
    """Some of the signals the ledger never takes; the others are recorded. ``new`` is what
    :meth:`Ledger.record` would have returned, False for the refused; ``refused`` maps their
    indices to the reason."""

    def __init__(self, new: list[bool], refused: dict[int, str]) -> None:
        reasons = ", ".join(sorted(set(refused.values())))
        super().__init__(f"the ledger refuses {len(refused)} signals: {reasons}", transient=False)
        self.new = new
        self.refused = refused


class Ledger(Protocol):
    """A ledger. Methods block, may be called from any thread, and raise :exc:`LedgerError`."""

    def record(self, signals: Sequence[Signal]) -> list[bool]:
        """Record signals, for good when it returns; for each, whether it is new. One whose id
        is there already changes nothing. After an error, as far as the ledger can, none of them
        is recorded, but for :exc:`RefusedError`."""

    def balance(self, tenant: str, rule_id: str) -> int:
        """How many signals of the rule hold: raised less retracted; 0 for an unknown rule."""

    def balances(self, tenant: str) -> dict[str, int]:
        """The balance of each rule of ``tenant`` that ever raised a signal, by rule id."""

    def replace(self, since: float) -> None:
        """A call that began at ``since`` (``time.monotonic``) was left behind: use another client
        from now on. What the call did is unknown; the same signals may be recorded again. This
        does not block."""

    def close(self) -> None:
        """Let go of the ledger, after a few seconds even if a call hangs. Twice does no harm; any
        other call then is an error."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A signal as its transfer. Ids are 128-bit integers."""

    id: int
    debit_account: int
    credit_account: int
    ledger: int
    code: Code


def _hash(*parts: str) -> bytes:
    """SHA-256 over the parts, each preceded by its length so that no two tuples join alike."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).digest()


@lru_cache(maxsize=_ACCOUNTS_KEPT)
def ledger_number(tenant: str) -> int:
    """The number of the tenant's ledger, 1 to 2**32-1. Two tenants may share a number; their
    accounts are different all the same."""
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
    """The id of the signal's transfer: its 32 hex digits as an integer. A permanent
    :exc:`LedgerError` where it is no such id."""
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
