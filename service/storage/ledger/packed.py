"""Transfers of signals in TigerBeetle's wire format.

The client makes a Python object of each transfer and each result, which takes as long as the
server's work. Here a request is joined from bytes, most of which are the same for all signals of a
rule. Layout: ``tb_transfer_t`` of https://docs.tigerbeetle.com/coding/clients/c; all integers are
little-endian.
"""

from __future__ import annotations

import ctypes
import inspect
import struct
from collections.abc import Sequence
from functools import lru_cache

import tigerbeetle as tb
from tigerbeetle import bindings

from betrace.service.signals import Kind, Signal
from betrace.service.storage.ledger.base import (
    AMOUNT,
    Code,
    ledger_number,
    rule_account,
    tenant_account,
    transfer,
)

SIZE = 128
"""Bytes of a transfer."""
_NUMBER_BYTES = 16  # of ids, accounts and amounts
_NO_NUMBER = bytes(_NUMBER_BYTES)
# user_data_64, user_data_32, timeout, ledger, code, flags, timestamp
_TAIL = struct.Struct("<QIIIHHQ")
_KEPT = 10_000


def pack(signals: Sequence[Signal]) -> bytes:
    """The transfers of signals whose ids are valid, one after the other. A transfer depends only on
    what makes up the signal's id, because a breach that is found again, after a crash or by another
    query node, must give the identical transfer."""
    parts: list[bytes] = []
    for signal in signals:
        between, tail = _of_rule(signal.tenant, signal.rule_id, signal.rule_version, signal.kind)
        parts += (bytes.fromhex(signal.id)[::-1], between, _trace(signal.trace_id), tail)
    return b"".join(parts)


@lru_cache(maxsize=_KEPT)
def _of_rule(tenant: str, rule_id: str, rule_version: str, kind: Kind) -> tuple[bytes, bytes]:
    """The bytes between the id and the trace id, and those after it."""
    accounts = (_number(rule_account(tenant, rule_id)), _number(tenant_account(tenant)))
    raised = kind is Kind.RAISED
    debit, credit = accounts if raised else accounts[::-1]
    code = Code.RAISED if raised else Code.RETRACTED
    between = debit + credit + _number(AMOUNT) + _NO_NUMBER
    version = _hexadecimal(rule_version, 64)
    return between, _TAIL.pack(version, 0, 0, ledger_number(tenant), code, 0, 0)


def _trace(trace_id: str) -> bytes:
    if len(trace_id) == 2 * _NUMBER_BYTES:
        try:
            number = bytes.fromhex(trace_id)
        except ValueError:
            number = b""
        if len(number) == _NUMBER_BYTES:
            return number[::-1]
    return _number(_hexadecimal(trace_id, 128))


def _number(number: int) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "little")


def _hexadecimal(text: str, bits: int) -> int:
    """``text`` as a hexadecimal number; 0 if it is not one or has too many bits."""
    try:
        number = int(text, 16)
    except ValueError:
        return 0
    return number if 0 <= number < 1 << bits else 0


class _Result(ctypes.Structure):
    """The answer to one transfer."""

    _fields_ = bindings.CCreateTransferResult._fields_

    def to_python(self) -> int:
        return int(self.status)


class PackedClient(tb.ClientSync):
    """TigerBeetle's client, which also takes packed transfers."""

    def create_packed(self, transfers: bytes) -> list[int]:
        """Send packed transfers. Returns the status of each, as in ``CreateTransferStatus``."""
        request = ctypes.c_uint8 * len(transfers)
        statuses: list[int] = self._submit(
            bindings.Operation.CREATE_TRANSFERS,
            [request.from_buffer_copy(transfers)],
            request,
            _Result,
        )
        return statuses


def _client_takes_bytes() -> bool:
    """Whether the installed client is made as :class:`PackedClient` expects: its method that sends
    a request is private, and another release may change it."""
    try:
        parameters = list(inspect.signature(tb.ClientSync._submit).parameters)
    except (AttributeError, TypeError, ValueError):
        return False
    expected = ["self", "operation", "operations", "c_event_type", "c_result_type"]
    return parameters == expected and ctypes.sizeof(bindings.CTransfer) == SIZE


_PACKED = _client_takes_bytes()


def connect(cluster_id: int, addresses: str) -> tb.ClientSync:
    """A client."""
    return (PackedClient if _PACKED else tb.ClientSync)(cluster_id, addresses)


def create_transfers(client: tb.ClientSync, signals: Sequence[Signal]) -> list[int]:
    """Send the transfers of signals. Returns the status of each."""
    if isinstance(client, PackedClient):
        return client.create_packed(pack(signals))
    return [result.status for result in client.create_transfers([*map(event, signals)])]


def status_name(status: int) -> str:
    """The name of a transfer's status; the number if this client does not know it."""
    try:
        return tb.CreateTransferStatus(status).name
    except ValueError:
        return str(status)


def event(signal: Signal) -> tb.Transfer:
    """The transfer of a signal as an object of the client; the same as :func:`pack` makes."""
    move = transfer(signal)
    return tb.Transfer(
        id=move.id,
        debit_account_id=move.debit_account,
        credit_account_id=move.credit_account,
        amount=AMOUNT,
        user_data_128=_hexadecimal(signal.trace_id, 128),
        user_data_64=_hexadecimal(signal.rule_version, 64),
        ledger=move.ledger,
        code=int(move.code),
    )
