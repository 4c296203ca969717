"""Content-Encoding: valid bodies, invalid bodies, and decompression bombs."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.otlp.encoding import BadEncoding, BodyTooLarge, UnknownEncoding, decode_body

LIMIT = 1 << 20
TEXT = b"resource spans, scope spans, spans; " * 300


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


def zstd_streamed(data: bytes) -> bytes:
    """A frame without its content size."""
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.compress),
    "zstd streamed": ("zstd", zstd_streamed),
}
every_encoder = pytest.mark.parametrize(
    ("encoding", "encode"), ENCODERS.values(), ids=ENCODERS.keys()
)


@every_encoder
@given(data=st.binary(max_size=2000), repeat=st.integers(0, 300))
def test_decoding_returns_the_original(
    encoding: str, encode: Callable[[bytes], bytes], data: bytes, repeat: int
) -> None:
    encoded = encode(data * repeat)
    assert decode_body(encoded, encoding, LIMIT) == data * repeat
    assert decode_body(memoryview(encoded), encoding, LIMIT) == data * repeat
    several = encoded + encoded  # gzip members and zstd frames may be joined
    if encoding != "deflate":
        assert decode_body(memoryview(several), encoding, LIMIT) == data * repeat * 2


def test_no_encoding() -> None:
    for name in ("", "identity", " Identity "):
        assert decode_body(TEXT, name, LIMIT) is TEXT
    with pytest.raises(BodyTooLarge):
        decode_body(TEXT, "", len(TEXT) - 1)


def test_names_are_case_insensitive() -> None:
    assert decode_body(gzip.compress(TEXT), "GZip", LIMIT) == TEXT
    assert decode_body(gzip.compress(TEXT), "x-gzip", LIMIT) == TEXT


@pytest.mark.parametrize("name", ["br", "gzip, gzip", "snappy"])
def test_the_error_for_an_unknown_encoding_lists_the_supported_ones(name: str) -> None:
    with pytest.raises(UnknownEncoding, match="Use one of gzip, zstd, deflate"):
        decode_body(TEXT, name, LIMIT)


@every_encoder
def test_the_limit_is_exact(encoding: str, encode: Callable[[bytes], bytes]) -> None:
    body = encode(TEXT)
    assert decode_body(body, encoding, len(TEXT)) == TEXT
    with pytest.raises(BodyTooLarge, match=f"larger than {len(TEXT) - 1} bytes"):
        decode_body(body, encoding, len(TEXT) - 1)


@every_encoder
def test_truncation_is_detected_anywhere(encoding: str, encode: Callable[[bytes], bytes]) -> None:
    body = encode(TEXT)
    for end in range(1, len(body)):
        with pytest.raises(BadEncoding):
            decode_body(body[:end], encoding, LIMIT)


@every_encoder
def test_garbage_is_refused(encoding: str, encode: Callable[[bytes], bytes]) -> None:
    for body in (encode(TEXT) + b"garbage", b"not compressed at all", b"\xff" * 50):
        with pytest.raises(BadEncoding, match="or uncompressed without that header"):
            decode_body(body, encoding, LIMIT)


@every_encoder
def test_an_empty_body_is_empty_in_every_encoding(
    encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    assert decode_body(b"", encoding, LIMIT) == b""
    assert decode_body(encode(b""), encoding, LIMIT) == b""


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "zstd streamed"])
def test_several_members_are_joined(encoding: str) -> None:
    name, encode = ENCODERS[encoding]
    body = encode(TEXT) + encode(b"") + encode(b"end")
    assert decode_body(body, name, LIMIT) == TEXT + b"end"
    with pytest.raises(BodyTooLarge):
        decode_body(body, name, len(TEXT) + 2)
    for cut in (1, 5, 9):
        with pytest.raises(BadEncoding):
            decode_body(body[:-cut], name, LIMIT)


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_a_wrong_checksum_is_refused(name: str) -> None:
    body = bytearray(ENCODERS[name][1](TEXT))
    body[-1 if name == "deflate" else -5] ^= 1
    with pytest.raises(BadEncoding):
        decode_body(bytes(body), name, LIMIT)


def test_raw_deflate_that_looks_wrapped() -> None:
    # 0x78 0x01 starts a zlib stream; as raw deflate it starts a stored block of one byte.
    body = b"\x78\x01\x00\xfe\xff" + b"!" + b"\x01\x00\x00\xff\xff"
    assert zlib.decompress(body, -15) == b"!"
    assert decode_body(body, "deflate", LIMIT) == b"!"


def rle_bomb(blocks: int) -> bytes:
    """A zstd frame of blocks that repeat one byte 128 Ki times: 4 bytes each."""
    header = b"\x28\xb5\x2f\xfd" + b"\x00\x58"  # no content size, window of 2 MiB
    middle = (0x20000 << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    last = (0x20000 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    return header + middle * (blocks - 1) + last


@pytest.mark.parametrize(
    ("encoding", "bomb"),
    [
        ("gzip", gzip.compress(bytes(100 << 20))),
        ("gzip", gzip.compress(bytes(1 << 19)) * 200),
        ("deflate", zlib.compress(bytes(100 << 20))),
        ("zstd", zstandard.compress(bytes(100 << 20))),
        ("zstd", rle_bomb(800)),
    ],
    ids=["gzip", "gzip members", "deflate", "zstd", "zstd blocks"],
)
def test_a_bomb_is_stopped_at_the_limit(encoding: str, bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decode_body(bomb, encoding, LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LIMIT + (12 << 20)


def test_the_zstd_bomb_is_a_valid_frame() -> None:
    assert decode_body(rle_bomb(3), "zstd", LIMIT) == b"x" * (3 << 17)


def test_a_zstd_frame_that_lies_about_its_size() -> None:
    body = bytearray(zstandard.compress(b"abc" * 100))
    at = 5  # after the magic number and the descriptor: the content size
    body[at] ^= 1
    with pytest.raises(BadEncoding):
        decode_body(bytes(body), "zstd", LIMIT)


def test_a_zstd_window_that_is_too_large() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = stream.compress(TEXT) + stream.flush()
    with pytest.raises(BadEncoding, match="level 19 or lower"):
        decode_body(body, "zstd", LIMIT)


def test_zstd_frames_without_end() -> None:
    with pytest.raises(BadEncoding, match="more than 1000 frames"):
        decode_body(zstandard.compress(b"") * 1001, "zstd", LIMIT)
