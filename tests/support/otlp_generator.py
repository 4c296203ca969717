"""Random protobuf trace requests, valid and invalid, to compare the scanner with the library.

Messages are generated field by field, as bytes, from the library's descriptors. So fields can come
in any order, twice, with a wrong wire type, with an overlong varint, or be unknown.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

F = FieldDescriptor
VARINT, FIXED64, DELIMITED, START_GROUP, END_GROUP, FIXED32 = range(6)

_WIRE_TYPES = {
    F.TYPE_BYTES: DELIMITED,
    F.TYPE_STRING: DELIMITED,
    F.TYPE_MESSAGE: DELIMITED,
    F.TYPE_BOOL: VARINT,
    F.TYPE_INT64: VARINT,
    F.TYPE_INT32: VARINT,
    F.TYPE_UINT32: VARINT,
    F.TYPE_ENUM: VARINT,
    F.TYPE_FIXED64: FIXED64,
    F.TYPE_DOUBLE: FIXED64,
    F.TYPE_FIXED32: FIXED32,
}
_KEYS = [
    "trace.complete", "service.name", "http.route", "k", "", "ключ", "error", "trace.completE",
    "a.rather.long.key.of.more.than.sixteen.bytes", "service.namf", "x" * 130,
]  # fmt: skip
_TEXTS = [
    "", "true", "false", "GET /orders/{id}", "abc", "1234567", "12345678", "123456789", "züri",
    "日本語テキスト", "🦊 fox", "a\0b", "x" * 127, "y" * 128, "z" * 300,
    "\ufffd\uffff", "\U0010ffff",
]  # fmt: skip
_BAD_TEXTS = [
    b"\xff", b"abc\x80", b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xed\xa0\x80",
    b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"ok then \xe2\x82", b"\xc3(",
    b"12345678\xc3", b"\xe2\x28\xa1", b"\xf0\x9f\xa6", b"\xf0\x9f\x28\x8a", b"\xf0\x9f\xa6\x28",
]  # fmt: skip
_NUMBERS = [
    0,
    1,
    2,
    3,
    5,
    127,
    128,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**32 + 2,
    2**63 - 1,
    2**63,
]


def varint(value: int, waste: int = 0) -> bytes:
    """Return ``value`` as a varint with ``waste`` superfluous bytes."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(waste):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def delimited(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | DELIMITED) + varint(len(payload)) + payload


class Generator:
    """Makes requests; ``bad`` is the probability of a fault at each possible place."""

    def __init__(self, seed: int, bad: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.bad = bad
        self.oddity = self.rng.choice([0.0, 0.02, 0.2])  # legal, but not written by any exporter

    def request(self) -> bytes:
        """Return a request with some spans."""
        return self.message(ExportTraceServiceRequest.DESCRIPTOR, 0)

    def message(self, descriptor: Descriptor, depth: int) -> bytes:
        """Return the bytes of a random message."""
        rng = self.rng
        fields: list[bytes] = []
        for field in descriptor.fields:
            fields += [self.field(field, depth) for _ in range(self.times(field, depth))]
        if self.odd():
            fields += [self.unknown(depth) for _ in range(rng.randrange(3))]
        if self.odd():
            rng.shuffle(fields)
        if rng.random() < self.bad:
            fields.insert(rng.randrange(len(fields) + 1), self.broken_field())
        return b"".join(fields)

    def times(self, field: F, depth: int) -> int:
        """Return how often a field occurs."""
        rng = self.rng
        if field.full_name.endswith(("Span.trace_id", "Span.span_id", "Span.name")):
            return 1 if not self.odd() else rng.randrange(3)
        if field.containing_oneof:
            if field.message_type and depth > 8:
                return 0
            return 1 if rng.random() < 0.18 else 0
        if field.full_name.endswith(("KeyValue.key", "KeyValue.value")):
            return 1 if not self.odd() else rng.randrange(3)
        if field.is_repeated:
            return rng.choice([0, 1, 1, 2, 4]) if depth < 8 else 0
        return 2 if self.odd() else int(rng.random() < 0.6)

    def odd(self) -> bool:
        return self.rng.random() < self.oddity

    def field(self, field: F, depth: int) -> bytes:
        """One occurrence of a known field."""
        if self.odd() and self.odd():
            wire_type = self.rng.choice([VARINT, FIXED64, DELIMITED, START_GROUP, FIXED32])
            if wire_type != _WIRE_TYPES[field.type]:
                return self.raw_field(field.number, wire_type, depth)
        tag = self.tag(field.number, _WIRE_TYPES[field.type])
        if field.message_type is not None:
            payload = self.message(field.message_type, depth + 1)
        elif field.type == F.TYPE_STRING:
            payload = self.text(field)
        elif field.type == F.TYPE_BYTES:
            payload = self.identifier(field)
        else:
            return tag + self.scalar(_WIRE_TYPES[field.type])
        return tag + self.length(len(payload)) + payload

    def scalar(self, wire_type: int) -> bytes:
        rng = self.rng
        number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.getrandbits(64)
        if wire_type == VARINT:
            encoded = varint(number, rng.randrange(4) if self.odd() else 0)
            if self.odd():
                encoded = b"\xff" * 9 + bytes([rng.randrange(128)])
            return encoded[:10] if len(encoded) <= 10 else varint(number)
        if wire_type == FIXED64:
            return number.to_bytes(8, "little")
        return (number & 0xFFFFFFFF).to_bytes(4, "little")

    def tag(self, number: int, wire_type: int) -> bytes:
        tag = varint(number << 3 | wire_type)
        if self.odd() and self.odd():
            tag = varint(number << 3 | wire_type, self.rng.randrange(6 - len(tag)))
        return tag

    def length(self, length: int) -> bytes:
        if self.rng.random() < self.bad:
            length = self.rng.choice(
                [length + 1, length - 1, 0, 2**31, 2**40, length + 200, 2**64 - 1]
            )
        return varint(length, self.rng.randrange(4) if self.odd() and self.odd() else 0)

    def text(self, field: F) -> bytes:
        rng = self.rng
        if rng.random() < self.bad:
            return rng.choice(_BAD_TEXTS)
        return rng.choice(_KEYS if field.name == "key" else _TEXTS).encode()

    def identifier(self, field: F) -> bytes:
        rng = self.rng
        usual = 16 if field.name == "trace_id" else 8
        if rng.random() < 0.06:
            return rng.choice(
                [b"", b"\0" * usual, rng.randbytes(usual - 1), rng.randbytes(usual + 1)]
            )
        return rng.choice([rng.randbytes(usual), b"\0" * (usual - 1) + b"\1", b"\xff" * usual])

    def raw_field(self, number: int, wire_type: int, depth: int) -> bytes:
        """A field of any number and wire type with arbitrary content."""
        rng = self.rng
        tag = self.tag(number, wire_type)
        if wire_type == DELIMITED:
            payload = rng.randbytes(rng.choice([0, 1, 5, 200]))
            return tag + self.length(len(payload)) + payload
        if wire_type == START_GROUP:
            inside = b"".join(self.group_field(depth + 1) for _ in range(rng.randrange(3)))
            end = number if rng.random() >= self.bad else number + 1
            return tag + inside + self.tag(end, END_GROUP)
        return tag + self.scalar(wire_type)

    def group_field(self, depth: int) -> bytes:
        """A field inside an unknown group, where even the field number 0 is allowed."""
        if self.odd():
            wire_type = self.rng.choice([VARINT, FIXED64, DELIMITED, FIXED32])
            return self.raw_field(0, wire_type, depth)
        return self.unknown(depth)

    def unknown(self, depth: int) -> bytes:
        """A field that no message has."""
        wire_types = [VARINT, FIXED64, DELIMITED, FIXED32]
        if depth < 12:
            wire_types.append(START_GROUP)
        number = self.rng.choice([9, 17, 19, 99, 1000, 70000, 2**29 - 1])
        return self.raw_field(number, self.rng.choice(wire_types), depth)

    def broken_field(self) -> bytes:
        """Return bytes that are not a field, or a field in a wrong place."""
        rng = self.rng
        return rng.choice(
            [
                varint(99 << 3) + b"\xff" * 10 + b"\1",  # eleven bytes
                b"\xff" * 5 + b"\1",  # a tag of six bytes
                b"\xf8\xff\xff\xff\x1f\0",  # a tag of more than 32 bits
                bytes([rng.randrange(8)]) + bytes(rng.randrange(10)),  # field number 0
                varint(99 << 3 | 6) + b"\0",
                varint(1 << 3 | 7) + b"\0",
                varint(99 << 3 | END_GROUP),
                varint(99 << 3 | START_GROUP),
                varint(99 << 3 | FIXED64) + b"\0" * 7,
                varint(99 << 3 | FIXED32) + b"\0" * 3,
                varint(99 << 3 | DELIMITED) + varint(5, 3) + b"\0" * 4,
                varint(99 << 3 | DELIMITED) + varint(0, 5),  # a length of six bytes
                varint(99 << 3 | DELIMITED) + varint(2**31 - 1),
            ]
        )


def nested(rng: random.Random) -> bytes:
    """Return a request nested about as deep as the limit, by values, groups or both."""
    levels = rng.randrange(80, 104)
    value = rng.choice([b"", varint(3 << 3) + varint(7), delimited(1, b"x")])
    if rng.random() < 0.5:
        inner = rng.randrange(1, 60)
        value = varint(99 << 3 | START_GROUP) * inner + varint(99 << 3 | END_GROUP) * inner
        levels -= inner
    depth = 0
    while depth < levels:
        kind = rng.randrange(3)
        if kind == 0 or depth + 3 > levels:  # an array in a value
            value = delimited(5, delimited(1, value))
            depth += 2
        elif kind == 1:
            value = delimited(6, delimited(1, delimited(1, b"key") + delimited(2, value)))
            depth += 3
        else:
            value = varint(99 << 3 | START_GROUP) + varint(99 << 3 | END_GROUP) + value
            depth += 1
    attribute = delimited(1, b"k") + delimited(2, value)
    span = delimited(1, b"\1" * 16) + delimited(2, b"\2" * 8)
    place = rng.randrange(4)
    if place == 0:
        return delimited(1, delimited(1, delimited(1, attribute)))
    if place == 1:
        span += delimited(11, delimited(3, attribute))
    else:
        span += delimited(9, attribute)
    return delimited(1, delimited(2, delimited(2, span)))


def mutate(rng: random.Random, body: bytes) -> bytes:
    """Return ``body`` with one to four small changes, or truncated."""
    data = bytearray(body)
    edits: list[Callable[[int], None]] = [
        lambda at: data.__setitem__(at, data[at] ^ 1 << rng.randrange(8)),
        lambda at: data.__setitem__(at, rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x12, 0x1A])),
        lambda at: data.__setitem__(at, (data[at] + rng.choice([-1, 1])) % 256),
        lambda at: data.insert(at, rng.randrange(256)),
        lambda at: data.__delitem__(at),
        lambda at: data.__delitem__(slice(at, at + rng.randrange(20))),
        lambda at: data.__setitem__(slice(at, at), data[at : at + rng.randrange(40)]),
        lambda at: data.__delitem__(slice(at, None)),
    ]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if data:
            rng.choice(edits)(rng.randrange(len(data)))
    return bytes(data)


def case(seed: int) -> bytes:
    """Return body number ``seed``: valid, unusual, broken, deep, mutated or truncated."""
    rng = random.Random(f"case {seed}")
    kind = rng.randrange(10)
    if kind == 0:
        return nested(rng)
    if kind <= 3:
        return Generator(seed).request()
    if kind <= 5:
        return Generator(seed, bad=rng.choice([0.002, 0.02])).request()
    return mutate(
        rng, nested(rng) if kind == 6 and rng.random() < 0.3 else Generator(seed).request()
    )
