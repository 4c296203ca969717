"""Messages, timeouts and statuses as bytes, against generated input."""

from __future__ import annotations

import itertools
import urllib.parse
from contextlib import suppress

import pytest
from hpack import Decoder
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PingFrame, SettingsFrame
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.receiver.grpc import frames
from betrace.service.receiver.grpc.frames import FrameReader, Http2Error
from betrace.service.receiver.grpc.framing import (
    FramingError,
    MessageReader,
    RpcStatus,
    TooLargeError,
    parse_timeout,
    percent_encode,
    success,
    trailers,
)
from tests.support.grpc_peer import prefixed


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


cuts = st.lists(st.integers(0, 10_000), max_size=8)


@given(st.binary(max_size=300), st.integers(0, 1), cuts)
def test_a_message_in_pieces(message, flag, cuts):
    reader = MessageReader(300)
    for piece in pieces(prefixed(message, flag), cuts):
        assert not reader.complete
        reader.feed(memoryview(piece))
    assert reader.complete
    assert bytes(reader.take()) == message
    assert (reader.received, reader.length) == (len(message), len(message))
    assert reader.compressed == bool(flag)


@given(st.binary(min_size=1, max_size=50), cuts)
def test_bytes_after_the_message_are_refused(more, cuts):
    reader = MessageReader(300)

    def feed_all():
        for piece in pieces(prefixed(b"message") + more, cuts):
            reader.feed(memoryview(piece))

    with pytest.raises(FramingError):
        feed_all()


def test_a_length_over_the_limit_is_refused_before_the_message():
    reader = MessageReader(300)
    with pytest.raises(TooLargeError):
        reader.feed(memoryview(b"\x00\xff\xff\xff\xff"))


@given(st.binary(max_size=300), st.integers(0, (1 << 30) - 1).map(lambda n: 2 * n + 1))
def test_a_success_is_what_h2_would_send(message, stream):
    reader, decoder = FrameReader(), Decoder()
    head, data, end = reader.feed(success(stream, message))
    assert {head.stream, data.stream, end.stream} == {stream}
    assert (head.kind, head.flags) == (frames.HEADERS, frames.END_HEADERS)
    assert (data.kind, data.ended, bytes(data.payload)) == (frames.DATA, False, prefixed(message))
    assert (end.kind, end.flags) == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM)
    assert decoder.decode(bytes(head.payload)) == [
        (":status", "200"),
        ("content-type", "application/grpc"),
    ]
    assert decoder.decode(bytes(end.payload)) == [("grpc-status", "0")]
    assert not decoder.header_table.dynamic_entries


headers = st.builds(
    lambda stream, data, end: HeadersFrame(
        2 * stream + 1, data, flags=["END_HEADERS"] + ["END_STREAM"] * end
    ),
    st.integers(0, 100),
    st.binary(max_size=60),
    st.booleans(),
)
data = st.builds(
    lambda stream, data, padding, end: DataFrame(
        2 * stream + 1,
        data,
        pad_length=padding or 0,
        flags=["PADDED"] * (padding is not None) + ["END_STREAM"] * end,
    ),
    st.integers(0, 100),
    st.binary(max_size=100),
    st.none() | st.integers(0, 255),
    st.booleans(),
)
others = st.builds(lambda data: PingFrame(0, data), st.binary(min_size=8, max_size=8))
others |= st.just(SettingsFrame(0, {4: 65_535}))


@given(st.lists(headers | data | others, max_size=8), cuts)
def test_frames_in_pieces(sent: list[Frame], cuts):
    wire = b"".join(frame.serialize() for frame in sent)
    reader, found = FrameReader(), []
    for piece in pieces(wire, cuts):
        for frame in reader.feed(piece):
            found.append((frame, bytes(frame.payload), bytes(frame.raw)))
    assert not reader.partial
    position = 0
    for want in sent:
        if not isinstance(want, DataFrame):
            assert found[position][2] == want.serialize()
            position += 1
            continue
        payload, flow = b"", 0
        while True:
            frame, part, _ = found[position]
            position += 1
            assert (frame.kind, frame.stream) == (frames.DATA, want.stream_id)
            payload += part
            flow += frame.flow_bytes
            if frame.ended or flow == want.flow_controlled_length:
                break
        assert payload == want.data
        assert flow == want.flow_controlled_length
        assert frame.ended == ("END_STREAM" in want.flags)
    assert position == len(found)


@given(st.binary(max_size=200), cuts)
def test_any_bytes_are_frames_or_refused(wire, cuts):
    reader = FrameReader()
    with suppress(Http2Error):
        for piece in pieces(wire, cuts):
            for frame in reader.feed(piece):
                assert frame.flow_bytes <= len(wire)


@given(st.text(max_size=1000))
def test_messages_are_percent_encoded(text):
    encoded = percent_encode(text)
    assert encoded.isascii()
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    sent = text.encode("utf-8", "replace").decode()
    assert urllib.parse.unquote(encoded.decode()) == sent


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600),
        (b"2M", 120),
        (b"10S", 10),
        (b"1500m", 1.5),
        (b"99999999u", 99.999999),
        (b"1n", 1e-9),
        (b"0S", 0),
    ],
)
def test_timeouts(value, seconds):
    assert parse_timeout(value) == pytest.approx(seconds)


@given(st.binary(max_size=12))
def test_other_timeouts_are_malformed(value):
    seconds = parse_timeout(value)
    well_formed = value[:-1].isdigit() and len(value) <= 9 and value[-1:] in b"HMSmun"
    assert (seconds is not None) == (len(value) > 1 and well_formed)


@given(st.integers(0, 16), st.text(max_size=50), st.none() | st.integers(0, 100))
def test_trailers(code, message, retry):
    fields = dict(trailers(RpcStatus(code, message, retry)))
    assert fields[b"grpc-status"] == b"%d" % code
    assert (b"grpc-message" in fields) == bool(message)
    assert (b"grpc-status-details-bin" in fields) == (retry is not None)
    assert all(value.isascii() and b"\n" not in value for value in fields.values())
