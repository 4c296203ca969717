"""Remembered header blocks decode to what hpack's own decoder says."""

from __future__ import annotations

from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.receiver.grpc.hpack_cache import RepeatingDecoder

name = st.sampled_from([b"a", b"b", b"authorization", b":path"])
value = st.sampled_from([b"", b"1", b"2", b"x" * 1500, b"y" * 3000])
fields = st.lists(st.tuples(name, value), max_size=4)


@given(st.lists(st.tuples(fields, st.sampled_from([None, 0, 100, 4096])), max_size=30))
def test_it_decodes_as_hpack_does(requests):
    encoder, plain, caching = Encoder(), Decoder(), RepeatingDecoder(1 << 16)
    for headers, table_size in requests:
        if table_size is not None:
            encoder.header_table_size = table_size
        block = encoder.encode(headers)
        assert list(caching.decode(block, raw=True)) == list(plain.decode(block, raw=True))
        assert caching.header_table.dynamic_entries == plain.header_table.dynamic_entries


def test_a_repeated_block_is_decoded_once(monkeypatch):
    encoder, decoder, decoded = Encoder(), RepeatingDecoder(1 << 16), []
    real = Decoder.decode
    monkeypatch.setattr(
        Decoder, "decode", lambda self, *given: decoded.append(given) or real(self, *given)
    )
    for _ in range(5):
        assert list(decoder.decode(encoder.encode([(b"a", b"1")]), True)) == [(b"a", b"1")]
    assert len(decoded) == 2  # the second names the entry that the first has made


def test_content_length_is_left_out():
    block = Encoder().encode([(b"content-length", b"5"), (b"a", b"1")])
    assert list(RepeatingDecoder(1000).decode(block, True)) == [(b"a", b"1")]
