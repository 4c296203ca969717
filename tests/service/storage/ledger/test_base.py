"""Signals as transfers."""

from __future__ import annotations

from betrace.service.signals import Kind
from betrace.service.storage.ledger.base import (
    Code,
    ledger_number,
    rule_account,
    tenant_account,
    transfer,
    transfer_id,
)
from tests.support.ledger_conformance import make


def test_a_raised_signal_moves_one_from_the_rule_to_the_tenant() -> None:
    signal = make(1)
    found = transfer(signal)
    assert found.id == int(signal.id, 16) == transfer_id(signal.id)
    assert found.debit_account == rule_account("shop", "r1")
    assert found.credit_account == tenant_account("shop")
    assert found.ledger == ledger_number("shop")
    assert found.code is Code.RAISED
    assert int(found.code) == 1


def test_a_retraction_is_the_opposite() -> None:
    raised, retracted = transfer(make(1)), transfer(make(1, kind=Kind.RETRACTED))
    assert retracted.id != raised.id
    assert (retracted.debit_account, retracted.credit_account) == (
        raised.credit_account,
        raised.debit_account,
    )
    assert retracted.code is Code.RETRACTED
    assert int(retracted.code) == 2


def test_accounts_are_distinct_and_stable() -> None:
    ids = [
        tenant_account("a"),
        tenant_account("ab"),
        rule_account("a", "b"),
        rule_account("ab", ""),
        rule_account("a", ""),
        rule_account("", "a"),
    ]
    assert len(set(ids)) == len(ids)
    assert all(0 < number < 1 << 128 for number in ids)
    assert 0 < ledger_number("a") < 1 << 32
    # ids of stored accounts: they must never change
    assert tenant_account("default") == 0x282A77F7ABADF3469802D790F1D8760C
    assert rule_account("default", "r") == 0x562B329971DF47A2B07F74B4337406E5
    assert ledger_number("default") == 3811990273
