"""Requests are split by partition without loss, compared with the protobuf library."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.otlp import split as split_module
from betrace.service.otlp.columns import BODY, ERROR, MSG_LEN, MSG_OFF, SpanBatch
from betrace.service.otlp.partition import partition_of
from betrace.service.otlp.split import BodyPart, TooMuchCopied, split
from betrace.service.otlp.wire import scan_bodies
from tests.support.otlp_generator import Generator, case

pytestmark = pytest.mark.kernel

LARGE = 1 << 20
Found = tuple[bytes, bytes, bytes]  # a span's resource, its scope, and the span


def without(message: Any, field: str) -> bytes:
    rest = type(message)()
    rest.CopyFrom(message)
    rest.ClearField(field)
    return rest.SerializeToString(deterministic=True)


def is_valid(identifier: bytes, size: int) -> bool:
    return len(identifier) == size and any(identifier)


def read(body: bytes | memoryview) -> Iterator[tuple[bytes, Found]]:
    """The accepted spans of a request as the library reads it, with their trace ids."""
    for resource in ExportTraceServiceRequest.FromString(bytes(body)).resource_spans:
        head = without(resource, "scope_spans")
        for scope in resource.scope_spans:
            scope_head = without(scope, "spans")
            for span in scope.spans:
                if is_valid(span.trace_id, 16) and is_valid(span.span_id, 8):
                    data = span.SerializeToString(deterministic=True)
                    yield span.trace_id, (head, scope_head, data)


def raw_spans(batch: SpanBatch) -> list[bytes]:
    return [batch.buf[row[MSG_OFF] : row[MSG_OFF] + row[MSG_LEN]].tobytes() for row in batch.spans]


def check(
    bodies: Sequence[bytes], partitions: int, most_bytes: int, tenant: str = "t"
) -> list[BodyPart]:
    """Split and compare with the library; returns the parts."""
    batch = scan_bodies(tenant, bodies)
    parts, too_large = split(batch, partitions, most_bytes)
    expected: dict[int, list[Found]] = {}
    for number, body in enumerate(bodies):
        if batch.bodies[number, ERROR] == 0 and number not in too_large:
            for trace_id, found in read(body):
                expected.setdefault(partition_of(tenant, trace_id, partitions), []).append(found)
    written: dict[int, list[Found]] = {}
    scanned: list[bytes] = []
    for part in parts:
        assert len(part.body) <= most_bytes
        spans = [found for _, found in read(part.body)]
        again = scan_bodies(tenant, [part.body])
        assert part.spans == len(spans) == len(again) > 0
        written.setdefault(part.partition, []).extend(spans)
        scanned += raw_spans(again)
    assert written == expected
    kept = [i for i, row in enumerate(batch.spans) if int(row[BODY]) not in too_large]
    originals = raw_spans(batch)
    assert sorted(scanned) == sorted(originals[i] for i in kept)  # bytes as received
    return parts


def request(*spans: tuple[int, int], text: str = "") -> bytes:
    """Spans of (trace, bytes of the name) in one resource with this attribute."""
    made = ExportTraceServiceRequest()
    resource = made.resource_spans.add()
    resource.resource.attributes.add(key="host").value.string_value = text
    scope = resource.scope_spans.add()
    scope.scope.name = "scope"
    for number, (trace, size) in enumerate(spans):
        ids = {"trace_id": trace.to_bytes(16, "big"), "span_id": (number + 1).to_bytes(8, "big")}
        scope.spans.add(name="n" * size, **ids)
    return made.SerializeToString()


@pytest.mark.parametrize("seed", range(40))
def test_the_parts_together_are_the_requests(seed: int) -> None:
    rng = random.Random(seed)
    bodies = [
        Generator(100 * seed + i).request() if rng.random() < 0.7 else case(100 * seed + i)
        for i in range(rng.randrange(1, 6))
    ]
    most_bytes = rng.choice([LARGE, LARGE, 2000, 300])
    check(bodies, rng.choice([1, 2, 3, 16, 64]), most_bytes, rng.choice(["t", "müller"]))


def test_requests_share_a_part_for_each_partition() -> None:
    bodies = [request(*((trace, 10) for trace in range(50)), text=f"{i}") for i in range(3)]
    parts = check(bodies, 4, LARGE)
    assert [part.partition for part in parts] == [0, 1, 2, 3]
    assert all(part.bodies == [0, 1, 2] for part in parts)


def test_a_part_names_the_requests_it_has_spans_of() -> None:
    bodies = [request((1, 5)), request((2, 5), (3, 5)), request()]
    parts = check(bodies, 1000, LARGE)
    named = {number: [p.partition for p in parts if number in p.bodies] for number in range(3)}
    assert named == {
        0: [partition_of("t", (1).to_bytes(16, "big"), 1000)],
        1: sorted(partition_of("t", trace.to_bytes(16, "big"), 1000) for trace in (2, 3)),
        2: [],
    }


def test_all_spans_of_a_trace_are_in_one_partition() -> None:
    parts = check([request(*[(7, 10)] * 100), request(*[(7, 10)] * 100)], 64, LARGE)
    assert [(part.spans, part.bodies) for part in parts] == [(200, [0, 1])]


def test_a_large_part_becomes_several() -> None:
    parts = check([request(*[(7, 100)] * 50)], 16, 1000)
    assert len(parts) > 5
    assert sum(part.spans for part in parts) == 50


def test_parts_of_several_spans_have_a_mebibyte_at_most() -> None:
    parts = check([request((7, 10), (7, 3 << 20), *[(7, 300_000)] * 5)], 4, 8 << 20)
    assert [part.spans for part in parts] == [1, 1, 3, 2]


def test_a_request_with_a_span_too_large_for_a_part_is_left_out_alone() -> None:
    bodies = [request((1, 10), (2, 10)), request((1, 10), (3, 2000)), request((4, 10))]
    batch = scan_bodies("t", bodies)
    parts, too_large = split(batch, 4, 1000)
    assert too_large == {1}
    assert sum(part.spans for part in parts) == 3
    check(bodies, 4, 1000)


def test_the_limit_counts_what_is_copied_with_a_span() -> None:
    body = request((1, 10), text="x" * 500)
    size = len(check([body], 4, LARGE)[0].body)
    assert len(check([body], 4, size)) == 1
    assert check([body], 4, size - 1) == []


def test_resources_copied_too_often_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    body = request(*((trace, 1) for trace in range(100)), text="x" * 10_000)
    batch = scan_bodies("t", [body])
    monkeypatch.setattr(split_module, "_MOST_COPIED", 100_000)
    with pytest.raises(TooMuchCopied):
        split(batch, 64, LARGE)
    assert len(split(batch, 1, LARGE)[0]) == 1


def test_nothing_is_split_into_nothing() -> None:
    assert split(scan_bodies("t", [b""]), 16, LARGE) == ([], set())
