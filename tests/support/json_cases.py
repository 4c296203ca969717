"""Random OTLP JSON bodies, valid and broken, for comparing the kernel with the reference decoder.

Requests are generated from the protobuf library's descriptors and mapped to JSON in all the ways
that the rules leave open. They are written as text by hand, because a library writes neither
repeated names nor unusual escapes, numbers and white space.
"""

from __future__ import annotations

import base64
import json
import math
import random
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.otlp_generator import Generator, mutate

_IDS = {"trace_id", "span_id", "parent_span_id"}


class Mapper:
    """Maps protobuf messages to the values of JSON, at random among the forms allowed."""

    def __init__(self, seed: int, ids: str = "hex") -> None:
        self.rng = random.Random(seed)
        self.ids = ids

    def message(self, message: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for field, value in message.ListFields():
            mapped = [self.value(field, v) for v in value] if field.is_repeated else None
            result[field.json_name] = self.value(field, value) if mapped is None else mapped
        if self.rng.random() < 0.1:
            result["unknownField"] = self.rng.choice([None, 1, "x", {"a": []}, [1]])
        if self.rng.random() < 0.1:
            missing = [f.json_name for f in message.DESCRIPTOR.fields if f.json_name not in result]
            result.update(dict.fromkeys(missing))
        items = list(result.items())
        self.rng.shuffle(items)
        return dict(items)

    def value(self, field: Any, value: Any) -> Any:
        rng = self.rng
        if field.message_type is not None:
            return self.message(value)
        if field.name in _IDS and self.ids == "hex":
            return value.hex().upper() if rng.random() < 0.3 else value.hex()
        if field.type == field.TYPE_BYTES:
            encode = rng.choice([base64.b64encode, base64.urlsafe_b64encode])
            text = encode(value).decode()
            return text.rstrip("=") if rng.random() < 0.3 else text
        if field.type == field.TYPE_DOUBLE:
            if math.isnan(value):
                return "NaN"
            if math.isinf(value):
                return "Infinity" if value > 0 else "-Infinity"
            if value.is_integer() and abs(value) < 2**53 and rng.random() < 0.3:
                return int(value) if value or math.copysign(1, value) > 0 else value
            return repr(value) if rng.random() < 0.2 else value
        if field.type == field.TYPE_ENUM or isinstance(value, str | bool):
            return value
        if abs(value) < 2**53 and rng.random() < 0.1:
            return float(value)
        return str(value) if rng.random() < 0.5 else value


class Raw(str):
    """JSON text that is written as it is."""


_NUMBERS = [
    "0", "-0", "-0.0", "0.0", "1e0", "5.0", "1e15", "9007199254740992.0", "9007199254740993.0",
    "9007199254740993", "-9007199254740992.0", "9007199254740994.0", "1.5e18", "2147483647",
    "2147483648", "-2147483648", "-2147483649", "4294967295", "4294967296", "9223372036854775807",
    "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "18446744073709551615",
    "18446744073709551616", "18446744073709551614.0", "99999999999999999999", "9" * 18, "9" * 19,
    "9" * 20, "9" * 21, "9" * 309, "1" + "0" * 308, "1" + "0" * 309, "1e308", "1e309", "-1e309",
    "1.7976931348623157e308", "1.7976931348623158e308", "1.7976931348623159e308", "1e-400",
    "4.9e-324", "2.4703282292062327e-324", "2.4703282292062328e-324", "2.2250738585072011e-308",
    "0e999", "1e00005", "1E+2", "1e-2", "1.5", "-1.5", "0.1", "123456789012345678.9",
    "9007199254740993.00000000000000000000001", "4503599627370496.5", "4503599627370497.5",
    "0." + "0" * 400 + "1e400", "0." + "0" * 20 + "12345", "1e22", "1e23", "1e-22", "1e-23",
    "8.5e22", "179769313486231580793e289", "3.0000000000000000000000000000001",
    "2.99999999999999999999", "1e99999999999999999999", "1e-99999999999999999999",
]  # fmt: skip
_NOT_NUMBERS = [
    "01", "-", "+1", ".5", "1.", "1.e5", "1e", "1e+", "-01", "--1", "0x10", "NaN", "Infinity",
    "-Infinity", "1_000", "1 0", "00", "1e5.5", "١",
]  # fmt: skip
_TEXTS = [
    "", "NaN", "Infinity", "-Infinity", "infinity", "nan", "-NaN", "true", "null", "0x1p3", " 1",
    "1 ", "007", "-007.5e1", "-", "+5", "1e5", "1_0", "00000000000000000001",
    "000000000000000000001", "-00000000000000000001", "١٢٣", "é" * 16, "=", "====", "a", "ab",
    "ab=", "a=b", "_-8", "/+8=", "QQ==", "QR", "QUI", "QUJ=", "ab" * 16, "AB" * 8, "a" * 31,
    "a" * 15, "a" * 33, "a" * 17, "0" * 32, "zz" * 16, "abc ", "\0", "\x7f", "\"\\/\b\f\n\r\t",
    "🦊", "\ud7ff\ue000", "\U0010ffff", "日本語" * 20, "x" * 127, "x" * 128, "y" * 16384,
]  # fmt: skip
_STRINGS = [
    '"\\ud800"', '"\\udc00"', '"\\ud800\\ud800"', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00"',
    '"\\ud83dx"', '"\\ud83d\\n"', '"\\u12"', '"\\u12g4"', '"\\x41"', '"\\"', '"', '"\t"', '"\x01"',
    '"\\u0000"', '"\\/"', '"\\u006e"', '"\\u00e9"', '"\\u20ac"', '"\\uffff"', '"a\\', '"\\u',
    '"0123456789abcde\\u0066"', '"0123456789abcde\x1f"', "'a'",
]  # fmt: skip
_ESCAPES = {
    '"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r",
    "\t": "\\t",
}  # fmt: skip


class Writer:
    """Writes JSON; ``bad`` is the chance of a fault or oddity at each value."""

    def __init__(self, seed: int, bad: float = 0.0) -> None:
        self.rng = random.Random(f"text {seed}")
        self.bad = bad
        self.spacing = self.rng.choice(["none", "usual", "wild"])
        self.escaping = self.rng.choice([0.0, 0.0, 0.02, 0.5])
        self.repeating = self.rng.choice([0.0, 0.0, 0.0, 0.05])

    def space(self) -> str:
        if self.spacing != "wild":
            return ""
        return "".join(self.rng.choices(" \t\r\n", k=self.rng.choice([0, 0, 1, 3])))

    def text(self, value: Any) -> str:
        if self.rng.random() < self.bad:
            value = self.odd_value()
        if isinstance(value, Raw):
            return value
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, list):
            return self.joined("[", [self.text(item) for item in value], "]")
        if isinstance(value, dict):
            return self.object(list(value.items()))
        if isinstance(value, float):
            return self.number(value)
        return json.dumps(value)

    def object(self, items: list[tuple[str, Any]]) -> str:
        rng = self.rng
        while items and rng.random() < self.repeating:
            name, value = rng.choice(items)
            other = rng.choice(
                [value, None, 0, "x", {}, [], self.odd_value(), *dict(items).values()]
            )
            items.insert(rng.randrange(len(items) + 1), (name, other))
        colon = ": " if self.spacing == "usual" else ":"
        members = [
            f"{self.string(name)}{self.space()}{colon}{self.space()}{self.text(value)}"
            for name, value in items
        ]
        return self.joined("{", members, "}")

    def joined(self, start: str, parts: list[str], end: str) -> str:
        comma = ", " if self.spacing == "usual" else ","
        inside = comma.join(f"{self.space()}{part}{self.space()}" for part in parts)
        return f"{start}{inside or self.space()}{end}"

    def string(self, text: str) -> str:
        return f'"{"".join(self.character(c) for c in text)}"'

    def character(self, c: str) -> str:
        if self.rng.random() < self.escaping or c < " " or c in '"\\':
            if c in _ESCAPES and self.rng.random() < 0.5:
                return _ESCAPES[c]
            form = self.rng.choice(["\\u{:04x}", "\\u{:04X}"])
            data = c.encode("utf-16-be", "surrogatepass")
            units = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
            return "".join(form.format(unit) for unit in units)
        return c

    def number(self, value: float) -> str:
        forms = ["{!r}", "{:.17e}", "{:.20g}", "{:.40f}" if abs(value) < 1e20 else "{!r}"]
        return self.rng.choice(forms).format(value)

    def odd_value(self) -> Any:
        rng = self.rng
        kind = rng.randrange(12)
        if kind <= 3:
            return Raw(rng.choice(_NUMBERS))
        if kind == 4:
            return rng.choice(_NUMBERS)
        if kind <= 6:
            return rng.choice(_TEXTS)
        if kind == 7:
            return rng.choice([None, True, False, {}, [], [None], [[]], {"a": {}}, [{}], 1, -1])
        if kind == 8:
            return {
                "stringValue": "a",
                rng.choice(["intValue", "boolValue", "other"]): rng.choice([None, 1]),
            }
        if kind == 9 and rng.random() < 0.3:
            return Raw(rng.choice(_NOT_NUMBERS))
        if kind == 10 and rng.random() < 0.3:
            return Raw(rng.choice(_STRINGS))
        digits = "".join(rng.choices("0123456789", k=rng.randrange(1, 30)))
        number = f"{digits.lstrip('0') or '0'}.{rng.randrange(10**9)}e{rng.randrange(-330, 310)}"
        return Raw(number) if rng.random() < 0.7 else number


def nested(rng: random.Random) -> bytes:
    """A body nested about as deep as allowed: in values, in unknown fields, or as plain JSON."""
    kind = rng.randrange(4)
    if kind == 0:
        levels = rng.randrange(1015, 1030)
        start, end = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"b":', "}]")])
        levels //= len(end)
        body = start * levels + rng.choice(["0", "[]", "{}", '""']) + end * levels
        return body.encode() if rng.random() < 0.2 else f'{{"unknown":{body}}}'.encode()
    value = rng.choice(['{"stringValue":"x"}', '{"intValue":1}', "{}", "5", "null"])
    if kind == 1:
        value = f'{{"x":{"[" * 800}{"]" * 800}}}'
    depth = rng.randrange(2, 8)
    deepest = rng.randrange(92, 102)
    while depth < deepest:
        if rng.random() < 0.5:
            value = f'{{"arrayValue":{{"values":[{value}]}}}}'
            depth += 2
        else:
            value = f'{{"kvlistValue":{{"values":[{{"key":"k","value":{value}}}]}}}}'
            depth += 3
    ids = f'"traceId":"{"ab" * 16}","spanId":"{"cd" * 8}"'
    span = f'{{{ids},"attributes":[{{"key":"k","value":{value}}}]}}'
    body = f'{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{span}]}}]}}]}}'
    return (body if rng.random() < 0.7 else body.replace(":", " : ")).encode()


def _tokens(rng: random.Random, body: bytes) -> bytes:
    """``body`` with some punctuation added, removed or exchanged."""
    data = bytearray(body)
    marks = [i for i, byte in enumerate(data) if byte in b'{}[],:"\\']
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not marks or not data:
            break
        at = min(rng.choice(marks), len(data) - 1)
        edit = rng.randrange(4)
        if edit == 0:
            data[at] = rng.choice(b'{}[],:"\\ 0n')
        elif edit == 1:
            del data[at]
        elif edit == 2:
            data[at:at] = rng.choice(
                [b"{}", b"[]", b",", b"null", b'"', b"\\", b"\0", b"\xff", b" "]
            )
        else:
            other = min(rng.choice(marks), len(data))
            data[at:at] = data[at:other][:200]
    return bytes(data)


def case(seed: int) -> bytes:
    """Body number ``seed``: valid, unusual, broken, deep, mutated or truncated."""
    rng = random.Random(f"json {seed}")
    kind = rng.randrange(10)
    if kind == 0:
        body = nested(rng)
        return mutate(rng, body) if rng.random() < 0.2 else body
    try:
        request = ExportTraceServiceRequest.FromString(Generator(seed).request())
    except DecodeError:  # an unknown field had a known one's number
        return b"{}"
    values = Mapper(seed).message(request)
    bad = 0.0 if kind <= 2 else rng.choice([0.0, 0.001, 0.01, 0.1])
    body = Writer(seed, bad).text(values).encode("utf-8", "surrogatepass")
    if kind == 7:
        return mutate(rng, body)
    if kind == 8:
        return _tokens(rng, body)
    if kind == 9:
        return body[: rng.randrange(len(body) + 1)]
    return body
