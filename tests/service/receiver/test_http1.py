"""HTTP/1.1 messages as bytes: any input, in any pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from betrace.service.receiver.http1 import ChunkedBody, NotHttpError, parse_head, render
from betrace.service.receiver.responses import respond
from tests.support.ingest_servers import chunk, post

HEAD = post(b"", "X-Scope-OrgID: acme", "Content-Length: 12", "Connection: keep-alive")

# Mostly bytes that matter to an HTTP parser.
telling = st.one_of(
    st.sampled_from(
        [b"\r\n", b"\r", b"\n", b" ", b"\t", b":", b";", b",", b"\0", b"\x80", b"0", b"a", b"\xff"]
    ),
    st.sampled_from(
        [
            b"Content-Length: 5\r\n",
            b"content-length: 99999999999999999999\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Host: y\r\n",
            b"\r\n\r\n",
            b"Expect: 100-continue\r\n",
            b"Connection: close\r\n",
            b"HTTP/1.1",
            b"0\r\n\r\n",
            b"http://[",
        ]
    ),
    st.binary(max_size=20),
)


@st.composite
def mutated(draw, *seeds: bytes) -> bytes:
    """One of ``seeds`` with parts of it cut out, doubled or overwritten."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        middle = draw(st.one_of(telling, st.just(data[start:end] * 2)))
        data = data[:start] + middle + data[end:]
    return data


@given(mutated(HEAD, b"GET http://x:1/a?b HTTP/1.0\r\n\r\n"))
@example(b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n")
@example(b"GET http://x:99999999/ HTTP/1.1\r\nHost: x\r\n\r\n")
def test_a_head_is_parsed_or_refused_and_nothing_else(block):
    try:
        head = parse_head(block.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    except NotHttpError as error:
        refusal = error
        head = None
    if head is None:
        assert refusal.status in (400, 431, 505)
        assert refusal.message
        return
    assert head.length is None or head.length >= 0
    named = [name for name, _ in head.headers]
    assert all(name == name.lower() and name for name in named)
    assert named.count(b"content-length") + named.count(b"transfer-encoding") <= 1
    assert "?" not in head.path


def test_the_fields_of_a_head():
    head = parse_head(HEAD)
    assert (head.method, head.path, head.length) == ("POST", "/v1/traces", 12)
    assert head.headers[2] == (b"x-scope-orgid", b"acme")
    assert head.persistent
    assert not head.expects_continue


@given(
    st.lists(st.one_of(st.binary(min_size=1, max_size=50), st.just(b"\r\n\r\n")), max_size=10),
    st.one_of(st.binary(max_size=30), st.sampled_from([b"\r\n\r\n", b"0\r\n\r\n", HEAD])),
    st.lists(st.integers(0, 600), max_size=10),
)
def test_the_end_of_a_chunked_body_does_not_depend_on_the_pieces(parts, after, cuts):
    wire = b"".join(map(chunk, parts)) + b"0\r\n\r\n" + after
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    body = ChunkedBody()
    rest = b""
    for start, end in pairwise(edges):
        rest += wire[start:end] if body.complete else body.feed(wire[start:end])
    assert body.complete
    assert bytes(body.data) == b"".join(parts)
    assert rest == after


@given(mutated(b"3\r\nabc\r\n1a;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nA: b\r\n\r\nGET /"))
def test_mutated_chunks_are_accepted_or_refused_whatever_the_pieces(wire):
    def outcome(pieces):
        body = ChunkedBody()
        rest = b""
        try:
            for piece in pieces:
                rest += piece if body.complete else body.feed(piece)
        except NotHttpError as error:
            return error.status
        return body.complete, bytes(body.data), rest

    assert outcome([wire]) == outcome([wire[i : i + 1] for i in range(len(wire))])


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("bodiless", [False, True])
def test_a_response_as_bytes(close, bodiless):
    response = respond(200, b"abc", b"text/plain", (b"connection", b"close"))
    data = render(response, close=close, bodiless=bodiless)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert b"content-length: 3" in lines
    assert lines.count(b"connection: close") == close
    assert body == (b"" if bodiless else b"abc")
