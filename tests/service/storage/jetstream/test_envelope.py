"""The format of the messages of the span log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.storage.jetstream.envelope import (
    Envelope,
    EnvelopeCorrupt,
    RulesMarker,
    Spans,
    TenantFrame,
    Tick,
    pack,
    unpack,
)

tenants = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=64)
frames = st.builds(
    TenantFrame,
    tenants,
    st.integers(0, 2**62),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=300),
)
envelopes = st.one_of(
    st.builds(Spans, st.lists(frames, max_size=5, unique_by=lambda frame: frame.tenant)),
    st.just(Tick()),
    st.builds(RulesMarker, tenants, st.integers(0, 2**63), st.binary(max_size=300)),
)


@given(envelopes)
def test_an_envelope_comes_back(envelope: Envelope) -> None:
    assert unpack(pack(envelope)) == envelope


@given(envelopes, st.data())
def test_a_damaged_envelope_is_noticed(envelope: Envelope, data: st.DataObject) -> None:
    packed = bytearray(pack(envelope))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= data.draw(st.integers(1, 255))
    else:
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    with pytest.raises(EnvelopeCorrupt):
        unpack(bytes(packed))


@given(st.binary(max_size=100))
def test_any_bytes_are_no_envelope(data: bytes) -> None:
    with pytest.raises(EnvelopeCorrupt):
        unpack(data)


def test_two_frames_of_a_tenant_are_refused() -> None:
    frame = TenantFrame("shop", 1, 1, b"x")
    with pytest.raises(ValueError, match="one frame per tenant"):
        pack(Spans([frame, frame]))


def test_a_newer_kind_is_named() -> None:
    import struct

    from isal.isal_zlib import crc32

    signed = struct.pack("<BBH", 9, 0, 0)
    data = b"BTE1" + signed + struct.pack("<I", crc32(b"", crc32(signed)))
    with pytest.raises(EnvelopeCorrupt, match="kind of envelope 9"):
        unpack(data)
