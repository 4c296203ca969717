"""Heads that repeat are recognized, whatever their Content-Length, and others are not."""

from __future__ import annotations

import pytest

from betrace.service.receiver import known_heads
from betrace.service.receiver.heads import Head
from betrace.service.receiver.http1 import parse_head
from betrace.service.receiver.known_heads import KnownHeads

ADMITTED = Head("acme", "protobuf", "", 5)


def head(length: object = 5, *lines: str, name: str = "Content-Length") -> bytes:
    given = ["POST /v1/traces HTTP/1.1", "Host: x", f"{name}: {length}", *lines]
    return "\r\n".join([*given, "", ""]).encode()


def kept(block: bytes) -> KnownHeads:
    heads = KnownHeads()
    heads.keep(block, parse_head(block), ADMITTED)
    return heads


@pytest.mark.parametrize("length", [0, 5, 6, 123456, "007"])
def test_a_head_with_another_length_is_known(length):
    found = kept(head(5, "Connection: close")).find(head(length, "Connection: close"))
    assert found is not None
    request, admitted = found
    expected = parse_head(head(length, "Connection: close"))
    for field in ("method", "path", "length", "persistent", "expects_continue"):
        assert getattr(request, field) == getattr(expected, field)
    assert admitted == Head("acme", "protobuf", "", int(length))


@pytest.mark.parametrize(
    "block",
    [
        head(5, "x: y"),
        head(5, name="content-length"),
        head("5x"),
        head("-5"),
        head("+5"),
        head(""),
        head("5, 5"),
        head(10**13),
        head(5).replace(b"/v1/traces", b"/v1/tracez"),
        b"POST /v1/traces HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/traces HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        head(5) + b"Content-Length: 5\r\n\r\n",
    ],
)
def test_another_head_is_not_known(block):
    assert kept(head(5)).find(block) is None


def test_the_length_of_one_request_does_not_change_another():
    heads = kept(head(5))
    first, second = heads.find(head(7)), heads.find(head(8))
    assert first is not None
    assert second is not None
    assert (first[0].length, second[0].length) == (7, 8)
    assert (first[1].length, second[1].length) == (7, 8)


def test_heads_are_not_kept_if_they_are_long_or_have_no_single_length(monkeypatch):
    assert len(kept(head(5, f"x: {'y' * known_heads.MOST_BYTES}"))) == 0
    assert len(kept(head(5, "x-note: content-length"))) == 0
    assert len(kept(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")) == 0
    monkeypatch.setattr(known_heads, "MOST_HEADS", 2)
    heads = KnownHeads()
    for number in range(4):
        block = head(5, f"x-scope-orgid: t{number}")
        heads.keep(block, parse_head(block), ADMITTED)
    assert len(heads) == 2
    assert heads.find(head(5, "x-scope-orgid: t3")) is not None
