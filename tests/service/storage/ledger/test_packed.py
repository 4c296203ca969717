"""Transfers as bytes are the transfers that the client would send."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import tigerbeetle as tb
from hypothesis import given, settings
from hypothesis import strategies as st
from tigerbeetle import bindings

from betrace.service.signals import Kind
from betrace.service.storage.ledger import packed
from tests.support.ledger_conformance import make

HEX = "0123456789abcdef"
odd = st.text(st.sampled_from(HEX + " _xX-g"), max_size=40)
signals = st.builds(
    lambda number, rule, tenant, kind, trace, version: replace(
        make(number, rule, tenant, kind), trace_id=trace, rule_version=version
    ),
    st.integers(0, 2**128 - 1),
    st.text(max_size=5),
    st.sampled_from(["shop", "größer", ""]),
    st.sampled_from(Kind),
    st.text(st.sampled_from(HEX), min_size=32, max_size=32) | odd,
    st.text(st.sampled_from(HEX), min_size=16, max_size=16) | odd,
)


@settings(deadline=None)
@given(st.lists(signals, max_size=5))
def test_they_are_the_bytes_of_the_client(some) -> None:
    expected = b"".join(bytes(bindings.CTransfer.from_param(packed.event(s))) for s in some)
    assert packed.pack(some) == expected
    assert len(expected) == packed.SIZE * len(some)


def test_a_transfer_does_not_depend_on_who_found_the_breach_or_when() -> None:
    signal = make(1)
    later = replace(signal, detected_at=5, message="other", evidence={}, labels={}, early=True)
    assert packed.pack([later]) == packed.pack([signal])
    assert packed.event(later) == packed.event(signal)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    """Requests of clients without a server, which answers each transfer with its place."""
    requests = []

    def init(client: Any, *rest: Any) -> Any:
        return bindings.InitStatus.SUCCESS

    def submit(client: Any, reference: Any) -> Any:
        packet = reference._obj
        requests.append((packet.operation, ctypes.string_at(packet.data, packet.data_size)))
        results = (bindings.CCreateTransferResult * (packet.data_size // packed.SIZE))()
        for place, result in enumerate(results):
            result.status = tb.CreateTransferStatus.CREATED - 54 * place
        pointer = ctypes.cast(results, bindings.OnCompletion._argtypes_[3])
        key = max(tb.client.Client._clients)
        packed.PackedClient._c_on_completion(
            key, ctypes.pointer(packet), 0, pointer, ctypes.sizeof(results)
        )
        return bindings.ClientStatus.OK

    monkeypatch.setattr(bindings, "tb_client_init", init)
    monkeypatch.setattr(bindings, "tb_client_submit", submit)
    monkeypatch.setattr(bindings, "tb_client_deinit", lambda client: None)
    return requests


def test_a_request_has_them_and_its_answer_the_status_of_each(submitted) -> None:
    client = packed.connect(0, "127.0.0.1:3000")
    assert isinstance(client, packed.PackedClient)
    some = [make(1), make(2, kind=Kind.RETRACTED)]
    created = tb.CreateTransferStatus.CREATED
    assert packed.create_transfers(client, some) == [created, created - 54]
    assert submitted == [(bindings.Operation.CREATE_TRANSFERS, packed.pack(some))]
    client.close()


def test_another_release_of_the_client_gets_objects(submitted, monkeypatch) -> None:
    def other(self: Any, request: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(tb.ClientSync, "_submit", other)
    assert not packed._client_takes_bytes()
    monkeypatch.delattr(tb.ClientSync, "_submit")
    assert not packed._client_takes_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(packed, "_PACKED", False)
    monkeypatch.setattr(bindings, "tb_client_init", lambda *a: bindings.InitStatus.SUCCESS)
    monkeypatch.setattr(bindings, "tb_client_deinit", lambda client: None)
    client = packed.connect(0, "127.0.0.1:3000")
    assert type(client) is tb.ClientSync
    sent = []
    answers = [tb.CreateTransferResult(0, tb.CreateTransferStatus.CREATED)]
    monkeypatch.setattr(client, "create_transfers", lambda some: sent.extend(some) or answers)
    assert packed.create_transfers(client, [make(1)]) == [tb.CreateTransferStatus.CREATED]
    assert sent == [packed.event(make(1))]
    client.close()


def test_a_status_of_a_newer_server_is_a_number() -> None:
    assert packed.status_name(tb.CreateTransferStatus.EXISTS) == "EXISTS"
    assert packed.status_name(123456) == "123456"
