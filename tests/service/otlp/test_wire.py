"""The protobuf scanner: its own rules, and agreement with the protobuf library."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from numba.core import config
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp import primitives, wire
from betrace.service.otlp.attributes import (
    ARRAY,
    BOOL,
    INT,
    LENGTH,
    MISSING,
    OUT_SIZE,
    RESOURCE_ATTRIBUTES,
    SPAN_ATTRIBUTES,
    TYPE,
    VALUE,
    find_attribute,
    find_resource_attribute,
    next_array_item,
)
from betrace.service.otlp.columns import (
    COMPLETE,
    END,
    ERROR,
    ERROR_OFF,
    FIRST_SPAN,
    FLAGS,
    KIND,
    NAME_HASH,
    PARENT_ID,
    REJECTED_SPAN_ID,
    REJECTED_TRACE_ID,
    RESOURCE,
    SCOPE,
    SERVICE_LEN,
    SPAN_COUNT,
    START,
    STATUS,
)  # fmt: skip
from betrace.service.otlp.scanner import MAX_DEPTH
from tests.support import otlp_reference as reference
from tests.support.otlp_generator import (
    DELIMITED,
    END_GROUP,
    FIXED32,
    FIXED64,
    START_GROUP,
    Generator,
    case,
    delimited,
    mutate,
    nested,
    varint,
)  # fmt: skip

pytestmark = pytest.mark.kernel

CASES = Path(__file__).parents[3] / "../shared/cases/otlp"
SHARE = max(1, 100 // settings.default.max_examples)  # try one of so many cases

IDS = delimited(1, b"\1" * 16) + delimited(2, b"\2" * 8)


def request(*spans: bytes) -> bytes:
    return delimited(1, delimited(2, b"".join(delimited(2, span) for span in spans)))


def attribute(key: bytes, value: bytes) -> bytes:
    return delimited(9, delimited(1, key) + delimited(2, value))


def find(span: bytes, key: bytes = b"k") -> tuple[int, int, int]:
    batch = wire.scan_bodies("t", [request(IDS + span)])
    assert batch.bodies[0, ERROR] == 0
    row = batch.spans[0]
    out = np.zeros(OUT_SIZE, np.int64)
    wanted = np.frombuffer(key, np.uint8)
    find_attribute(batch.buf, row[-2], row[-1], SPAN_ATTRIBUTES, wanted, 0, len(key), out)
    return int(out[TYPE]), int(out[VALUE]), int(out[LENGTH])


@pytest.mark.parametrize("part", range(4))
def test_same_as_the_protobuf_library(part: int) -> None:
    accepted = 0
    seeds = range(part * 1000, part * 1000 + 1000 // SHARE)
    for seed in seeds:
        body = case(seed)
        if reference.check([body]):
            accepted += 1
            canonical = reference.parse(body).SerializeToString()
            assert reference.check([canonical], strict=True) == 1
    assert 0.3 < accepted / len(seeds) < 0.9  # both accepted and refused bodies occurred


@pytest.mark.parametrize("seed", range(0, 60, SHARE))
def test_bodies_scanned_together_do_not_affect_each_other(seed: int) -> None:
    rng = random.Random(seed)
    reference.check([case(rng.randrange(10**6)) for _ in range(rng.randrange(2, 9))])


def test_every_truncation_is_judged_as_the_library_does() -> None:
    body = Generator(11).request()[:700] if config.DISABLE_JIT else Generator(11).request()
    for end in range(0, len(body), 1 + len(body) // (1500 // SHARE)):
        reference.check([body[:end]])


def test_a_real_exporters_request() -> None:
    if not CASES.exists():
        pytest.skip("the shared test cases are missing")
    body = (CASES / "shop.pb").read_bytes()
    assert reference.check([body], strict=True) == 1
    for seed in range(0, 300, SHARE):
        reference.check([mutate(random.Random(seed), body)])


def test_no_bodies_and_empty_bodies() -> None:
    assert len(wire.scan_bodies("t", [])) == 0
    batch = wire.scan_bodies("t", [b""])
    assert len(batch) == 0
    assert batch.bodies[0, ERROR] == 0
    assert reference.check([b"", b"", delimited(1, b"")]) == 3


def test_a_single_body_is_not_copied_and_may_be_any_bytes_type() -> None:
    body = bytearray(request(IDS + delimited(5, b"one")))
    for given in (body, memoryview(body), bytes(body)):
        batch = wire.scan_bodies("acme", [given])
        assert batch.tenant == "acme"
        assert np.shares_memory(batch.buf, np.frombuffer(given, np.uint8))
        assert batch.name(0) == "one"
        assert batch.spans[0, NAME_HASH] == wire.hash_text("one")


def test_more_spans_than_estimated() -> None:
    count = 3000 // SHARE
    body = request(*[IDS] * count)
    batch = wire.scan_bodies("t", [body, body])
    assert len(batch) == 2 * count
    assert list(batch.bodies[:, FIRST_SPAN]) == [0, count]
    assert list(batch.bodies[:, SPAN_COUNT]) == [count, count]
    many_resources = request(IDS) * count
    batch = wire.scan_bodies("t", [many_resources])
    assert len(batch.resources) == len(batch.scopes) == count
    assert list(batch.spans[:, RESOURCE]) == list(batch.spans[:, SCOPE]) == list(range(count))


def test_resources_without_an_accepted_span_have_no_row() -> None:
    batch = wire.scan_bodies("t", [delimited(1, b"") * 1000 + request(delimited(5, b"no ids"))])
    assert len(batch.resources) == len(batch.scopes) == 0
    assert batch.bodies[0, REJECTED_TRACE_ID] == 1


def test_spans_with_bad_ids_are_counted_and_the_rest_is_kept() -> None:
    trace, span = delimited(1, b"\1" * 16), delimited(2, b"\2" * 8)
    batch = wire.scan_bodies(
        "t",
        [
            request(
                delimited(1, b"\1" * 15) + span,
                delimited(1, bytes(16)) + delimited(2, b""),
                trace,
                trace + delimited(2, bytes(8)),
                trace + delimited(2, b"\2" * 16),
                trace + span + delimited(5, b"good"),
            )
        ],
    )
    assert [batch.name(0)] == ["good"]
    assert batch.bodies[0, REJECTED_TRACE_ID] == 2
    assert batch.bodies[0, REJECTED_SPAN_ID] == 3


def test_an_error_discards_the_bodys_spans_and_has_a_position() -> None:
    good = request(IDS + delimited(5, b"good"))
    bad = request(IDS) + varint(99 << 3 | 6)
    batch = wire.scan_bodies("t", [good, bad, good])
    assert len(batch) == 2
    assert list(batch.bodies[:, SPAN_COUNT]) == [1, 0, 1]
    assert batch.bodies[1, ERROR] == primitives.BAD_WIRE_TYPE
    assert batch.bodies[1, ERROR_OFF] == len(request(IDS))


@pytest.mark.parametrize(
    ("field", "error"),
    [
        (varint(99 << 3 | DELIMITED) + b"\5abc", primitives.TRUNCATED),
        (varint(99 << 3 | FIXED64) + b"1234567", primitives.TRUNCATED),
        (varint(99 << 3 | FIXED32) + b"123", primitives.TRUNCATED),
        (varint(99 << 3) + b"\x80", primitives.TRUNCATED),
        (b"\x80", primitives.TRUNCATED),
        (varint(99 << 3) + b"\xff" * 10 + b"\1", primitives.BAD_VARINT),
        (b"\0\0", primitives.BAD_TAG),
        (b"\1" + bytes(8), primitives.BAD_TAG),
        (b"\2\0", primitives.BAD_TAG),
        (b"\3\4", primitives.BAD_TAG),
        (b"\5" + bytes(4), primitives.BAD_TAG),
        (b"\xf8\xff\xff\xff\x1f\0", primitives.BAD_TAG),
        (b"\x80" * 6 + b"\0", primitives.BAD_TAG),
        (b"\x0e", primitives.BAD_WIRE_TYPE),
        (b"\x0f", primitives.BAD_WIRE_TYPE),
        (varint(99 << 3 | DELIMITED) + varint(0, 5), primitives.BAD_LENGTH),
        (varint(99 << 3 | DELIMITED) + varint(2**31 - 1), primitives.BAD_LENGTH),
        (varint(99 << 3 | DELIMITED) + varint(2**31 - 2), primitives.TRUNCATED),
        (delimited(1, delimited(3, b"\xff")), primitives.BAD_UTF8),
        (varint(99 << 3 | END_GROUP), primitives.BAD_GROUP),
        (varint(99 << 3 | START_GROUP), primitives.BAD_GROUP),
        (varint(99 << 3 | START_GROUP) + varint(98 << 3 | END_GROUP), primitives.BAD_GROUP),
    ],
)
def test_each_error_has_a_code_and_a_message(field: bytes, error: int) -> None:
    batch = wire.scan_bodies("t", [field])
    assert batch.bodies[0, ERROR] == error
    assert len(wire.ERRORS[error]) > 40
    assert reference.parse(field) is None


def test_nesting_up_to_the_librarys_limit() -> None:
    def groups(depth: int) -> bytes:
        return varint(99 << 3 | START_GROUP) * depth + varint(99 << 3 | END_GROUP) * depth

    def arrays(depth: int) -> bytes:  # depth messages, the innermost an empty value
        value = b""
        for _ in range(depth // 2):
            value = delimited(5, delimited(1, value))
        return value

    inside = 5  # resource spans, scope spans, span, attribute, its value
    bodies = [
        groups(MAX_DEPTH),
        groups(MAX_DEPTH + 1),
        request(IDS + groups(MAX_DEPTH - 3)),
        request(IDS + groups(MAX_DEPTH - 2)),
        request(IDS + attribute(b"k", arrays(MAX_DEPTH - inside - 1) + groups(1))),
        request(IDS + attribute(b"k", arrays(MAX_DEPTH - inside + 1))),
    ]
    errors = wire.scan_bodies("t", bodies).bodies[:, ERROR]
    assert list(errors) == [0, primitives.TOO_DEEP] * 3
    assert reference.check(bodies) == 3
    for seed in range(0, 300, SHARE):
        reference.check([nested(random.Random(seed))])


def test_the_shortcut_checks_attributes_at_the_limit() -> None:
    for levels in range(88, 104):
        value = delimited(1, b"text")
        depth = 5
        while depth < levels:
            pair = delimited(1, b"key") + delimited(2, value)
            value, depth = delimited(6, delimited(1, pair)), depth + 3
        reference.check([request(IDS + attribute(b"k", value))])


def test_numbers_at_their_limits() -> None:
    def fields(kind: int, code: int, start: int, end: int) -> bytes:
        return (
            IDS
            + (varint(6 << 3) + varint(kind))
            + delimited(15, varint(3 << 3) + varint(code))
            + (varint(7 << 3 | FIXED64) + start.to_bytes(8, "little"))
            + (varint(8 << 3 | FIXED64) + end.to_bytes(8, "little"))
        )

    batch = wire.scan_bodies("t", [request(fields(2**32 + 3, 2**64 - 1, 2**63, 2**63 - 1))])
    row = batch.spans[0]
    assert (row[KIND], row[STATUS]) == (3, -1)
    assert (row[START], row[END]) == (2**63 - 1, 2**63 - 1)


def test_a_parent_id_of_the_wrong_length_is_a_parent_with_id_0() -> None:
    spans = [
        IDS + delimited(4, parent)
        for parent in (b"", bytes(8), bytes(3), b"\0\1", b"\0" * 7 + b"\5")
    ]
    rows = wire.scan_bodies("t", [request(*spans)]).spans
    assert list(rows[:, FLAGS]) == [0, 0, 0, 1, 1]
    assert list(rows[:, PARENT_ID]) == [0, 0, 0, 0, 5]


DONE = b"trace.complete"
YES, NO = varint(2 << 3) + b"\1", varint(2 << 3) + b"\0"


@pytest.mark.parametrize(
    ("attributes", "complete"),
    [
        (attribute(DONE, YES), True),
        (attribute(DONE, NO), False),
        (attribute(DONE, delimited(1, b"true")), True),
        (attribute(DONE, delimited(1, b"True")), False),
        (attribute(DONE, varint(3 << 3) + b"\1"), False),
        (attribute(b"trace.completE", YES), False),
        (attribute(DONE, b"") + attribute(DONE, delimited(1, b"true")), True),
        (attribute(DONE, delimited(1, b"no")) + attribute(DONE, YES), False),
        (delimited(9, delimited(2, YES) + delimited(1, DONE)), True),
        (delimited(11, delimited(3, delimited(1, DONE) + delimited(2, YES))), False),
    ],
)
def test_a_span_that_completes_its_trace(attributes: bytes, complete: bool) -> None:
    batch = wire.scan_bodies("t", [request(IDS + attributes)])
    assert bool(batch.spans[0, FLAGS] & COMPLETE) == complete


def test_the_service_name_is_of_the_first_attribute_with_a_value() -> None:
    def service(*resources: bytes) -> str | None:
        parts = b"".join(delimited(1, r) for r in resources)
        scope_spans = delimited(2, delimited(2, IDS))
        for order in (parts + scope_spans, scope_spans + parts):
            batch = wire.scan_bodies("t", [delimited(1, order)])
            row = batch.resources[0]
        return None if row[SERVICE_LEN] < 0 else batch.text(int(row[2]), int(row[3]))

    def pair(value: bytes) -> bytes:
        return delimited(1, delimited(1, b"service.name") + value)

    assert service() is None
    assert service(pair(delimited(2, delimited(1, b"shop")))) == "shop"
    assert service(pair(b""), pair(delimited(2, delimited(1, b"shop")))) == "shop"
    assert service(pair(delimited(2, delimited(1, b"")))) == ""
    assert service(pair(delimited(2, varint(3 << 3) + b"\7"))) is None


def test_finding_attributes() -> None:
    number = varint(3 << 3) + varint(-5)
    assert find(attribute(b"k", number))[:2] == (INT, -5)
    assert find(attribute(b"kk", number))[0] == MISSING
    assert find(attribute(b"k", b"") + attribute(b"k", number))[:2] == (INT, -5)
    assert find(attribute(b"k", number) + attribute(b"k", delimited(1, b"x")))[0] == INT
    assert find(attribute(b"k", delimited(1, b"x") + number))[0] == INT  # oneof: the last
    twice = delimited(9, delimited(1, b"z") + delimited(2, number) + delimited(1, b"k"))
    assert find(twice)[:2] == (INT, -5)  # the last key
    assert find(twice, b"z")[0] == MISSING
    assert find(attribute(b"k", number + varint(8 << 3) + b"\1"))[0] == MISSING
    assert find(attribute(b"", varint(2 << 3) + varint(2**40)), b"")[:2] == (BOOL, 1)


def test_of_two_arrays_in_one_value_the_last_counts() -> None:
    one, two = (delimited(5, delimited(1, delimited(1, x))) for x in (b"a", b"b"))
    kind, off, length = find(attribute(b"k", one + two))
    assert kind == ARRAY
    batch = wire.scan_bodies("t", [request(IDS + attribute(b"k", one + two))])
    out = np.zeros(OUT_SIZE, np.int64)
    cursor = next_array_item(batch.buf, off, length, 0, out)
    assert batch.text(int(out[VALUE]), int(out[LENGTH])) == "b"
    assert next_array_item(batch.buf, off, length, cursor, out) == -1


def test_finders_terminate_on_unvalidated_bytes() -> None:
    rng = random.Random(5)
    key = np.frombuffer(b"k", np.uint8)
    out = np.zeros(OUT_SIZE, np.int64)
    for seed in range(0, 400, SHARE):
        data = mutate(
            rng, mutate(rng, attribute(b"k", delimited(5, delimited(1, rng.randbytes(9)))))
        )
        if seed % 2:
            data = rng.randbytes(rng.randrange(1, 40))
        if not data:
            continue
        buf = np.frombuffer(data, np.uint8)
        for field in (SPAN_ATTRIBUTES, RESOURCE_ATTRIBUTES):
            find_attribute(buf, 0, len(buf), field, key, 0, 1, out)
        find_resource_attribute(buf, 0, len(buf), key, 0, 1, out)
        cursor = 0
        for _ in range(100):
            cursor = next_array_item(buf, 0, len(buf), cursor, out)
            if cursor < 0:
                break
        else:
            pytest.fail("the items do not end")


def test_the_hash_sees_every_byte_and_the_length() -> None:
    texts = {"a" * n for n in range(40)} | {"a" * n + "b" for n in range(40)}
    texts |= {"a" * n + "b" + "a" * (20 - n) for n in range(20)} | {"a\0", "\0", "\0\0"}
    assert len({wire.hash_text(text) for text in texts}) == len(texts)
    data = np.frombuffer(b"xxGET /orders/{id}yy", np.uint8)
    with np.errstate(over="ignore"):
        assert primitives.hash_bytes(data, 2, 16) == wire.hash_text("GET /orders/{id}")
        # At the end of a buffer the last bytes are read differently.
        inside = np.frombuffer(b"yy" * 9, np.uint8)
        assert primitives.hash_bytes(data, 18, 2) == primitives.hash_bytes(inside, 2, 2)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_utf8_is_validated_like_in_python() -> None:
    edges = bytes([0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF])
    sequences = [
        bytes([lead, *rest])
        for lead in (range(0x7E, 0x100) if SHARE == 1 else (0xC1, 0xC2, 0xE0, 0xED, 0xF0, 0xF4))
        for length in range(4)
        for rest in itertools.product(edges, repeat=length)
    ]
    for before in (b"", b"1234567"):  # the second: across two words
        for sequence in sequences if not before else sequences[::7]:
            data = before + sequence
            array = np.frombuffer(data, np.uint8)
            assert primitives.is_utf8(array, 0, len(array)) == is_utf8(data), data


def test_words_outside_the_buffer_are_not_read() -> None:
    data = np.zeros(9, np.uint8)
    for load in (primitives.load64, primitives.load64_big):
        assert load(data, 1) == 0
        for index in (2, -1, 2**62):
            with pytest.raises(IndexError):
                load(data, index)


def test_bytes_outside_an_array_are_not_copied() -> None:
    data, out = np.arange(9, dtype=np.uint8), np.zeros(5, np.uint8)
    assert primitives.copy_bytes(data, 2, 6, out, 1) == 5
    assert out.tolist() == [0, 2, 3, 4, 5]
    assert primitives.copy_bytes(data, 9, 9, out, 5) == 5
    for start, end, at in ((-1, 2, 0), (3, 2, 0), (8, 10, 0), (0, 3, -1), (0, 3, 3), (0, 6, 0)):
        with pytest.raises(IndexError):
            primitives.copy_bytes(data, start, end, out, at)
    assert out.tolist() == [0, 2, 3, 4, 5]


def test_big_request_survives() -> None:
    """Many kinds of values in one request written by the library."""
    r = ExportTraceServiceRequest()
    span = (
        r.resource_spans.add().scope_spans.add().spans.add(trace_id=b"\1" * 16, span_id=b"\2" * 8)
    )
    for i in range(60):
        span.attributes.add(key=f"s{i}").value.string_value = "ä" * i
        span.attributes.add(key=f"i{i}").value.int_value = -(2**i)
        span.attributes.add(key=f"d{i}").value.double_value = i / 7
        span.attributes.add(key=f"b{i}").value.bytes_value = bytes([i, 255]) * i
        values = span.attributes.add(key=f"a{i}").value.array_value.values
        for j in range(i % 5):
            values.add().int_value = j
    assert reference.check([r.SerializeToString()], strict=True) == 1


def test_warm_up_compiles_every_kernel() -> None:
    wire.warm_up()
    if not config.DISABLE_JIT:
        for kernel in (
            find_attribute,
            next_array_item,
            find_resource_attribute,
        ):
            assert kernel.signatures  # type: ignore[attr-defined]
