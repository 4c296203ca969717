"""Decoding bodies to protobuf."""

from __future__ import annotations

import gzip

import pytest

from betrace.service.otlp.body import BadBody, protobuf_body
from betrace.service.otlp.encoding import BodyTooLarge
from betrace.service.otlp.json import to_protobuf

JSON = b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"name":"a"}]}]}]}'


def test_protobuf_is_decompressed_but_not_parsed() -> None:
    assert protobuf_body(gzip.compress(b"\x07" * 9), "protobuf", "gzip", 100) == b"\x07" * 9
    assert protobuf_body(b"\x07", "protobuf", "", 100) == b"\x07"


@pytest.mark.parametrize(
    ("body", "encoding"), [(JSON, ""), (gzip.compress(JSON), "gzip")], ids=["plain", "gzip"]
)
def test_json_becomes_protobuf(body: bytes, encoding: str) -> None:
    assert protobuf_body(body, "json", encoding, 1000) == to_protobuf(JSON)


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "reason"),
    [
        (b"no gzip", "protobuf", "gzip", "gzip"),
        (b"{}", "protobuf", "br", "not supported"),
        (b"{", "json", "", "JSON"),
    ],
)
def test_bad_body(body: bytes, content_type: str, encoding: str, reason: str) -> None:
    with pytest.raises(BadBody, match=reason):
        protobuf_body(body, content_type, encoding, 100)


def test_the_limit_holds_for_the_decompressed_size() -> None:
    with pytest.raises(BodyTooLarge):
        protobuf_body(gzip.compress(bytes(101)), "protobuf", "gzip", 100)
