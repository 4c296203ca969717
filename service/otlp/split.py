"""Kernels that split scanned requests by partition (:mod:`betrace.service.otlp.partition`).

The result is a few parts, each a request body again. Spans are copied as received; each part has
copies of their resources and scopes with all fields, known or not, in their order. Spans that were
rejected are left out, and so are resources and scopes without spans. The requests of a batch share
parts: a part is what all of them have for one partition, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from betrace.service.jit import lean_kernel
from betrace.service.otlp.attributes import skip
from betrace.service.otlp.columns import (
    BODY,
    MSG_LEN,
    MSG_OFF,
    RESOURCE,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SCOPE,
    TRACE_HI,
    TRACE_LO,
    Bytes,
    Rows,
    SpanBatch,
)
from betrace.service.otlp.partition import partition, tenant_seed
from betrace.service.otlp.primitives import copy_bytes, read_length, read_tag
from betrace.service.otlp.subset import (
    HEAD,
    RESOURCE_SPANS,
    SCOPE_SPANS,
    SPAN,
    put_head,
)
from betrace.service.otlp.wire import sample, scan_bodies

# Columns of a part row.
PARTITION, OFFSET, LENGTH, SPANS = range(4)
_PART_COLUMNS = 4

_START, _END = range(2)  # columns of a head row: where its bytes are in heads

USUAL_BYTES = 1 << 20
"""Size of a part, unless a single span needs more."""
_MOST_COPIED = 64 << 20
"""Bytes of all parts. A resource is copied into each partition that has a span of it."""


class TooMuchCopied(ValueError):  # noqa: N818 - named for what it is, HTTP 413
    """The parts of a batch would be far larger than the batch."""


@dataclass(frozen=True, slots=True, eq=False)
class BodyPart:
    """What a batch has for one partition: a request of ``spans`` spans, which are from the bodies
    with the rows ``bodies`` of the batch."""

    partition: int
    body: memoryview
    spans: int
    bodies: list[int]


def split(
    batch: SpanBatch, partitions: int, most_bytes: int, first: int = 0
) -> tuple[list[BodyPart], set[int]]:
    """Split the spans of a batch into parts of at most ``most_bytes`` each, and of 1 MiB if they
    have several spans, for the partitions from ``first`` on. Returns with them the rows of bodies
    that are in no part because one of their spans cannot fit in any.

    Raises:
      TooMuchCopied: the parts together would have more than 64 MiB.
    """
    count = len(batch)
    if not count:
        return [], set()
    heads = np.empty(len(batch.buf), np.uint8)
    resource_heads = np.empty((len(batch.resources), 2), np.int64)
    scope_heads = np.empty((len(batch.scopes), 2), np.int64)
    _copy_heads(batch.buf, batch.spans, batch.resources, heads, resource_heads, scope_heads)
    all_heads = (heads, resource_heads, scope_heads)

    too_large = np.zeros(len(batch.bodies), np.uint8)
    _find_too_large(batch.spans, resource_heads, scope_heads, most_bytes, too_large)
    order = np.empty(count, np.int64)
    starts = np.zeros(partitions + 1, np.int64)
    with np.errstate(over="ignore"):  # the hash wraps around, which warns with the JIT off
        _order(batch.spans, tenant_seed(batch.tenant), starts, order)

    given = (
        batch.buf,
        batch.spans,
        *all_heads,
        too_large,
        starts,
        order,
        min(most_bytes, USUAL_BYTES),
    )
    no_rows = np.empty((0, _PART_COLUMNS), np.int64)
    number, size = _write_parts(
        *given, False, np.empty(0, np.uint8), no_rows, np.empty((0, 0), np.uint8)
    )
    if size > _MOST_COPIED:
        raise TooMuchCopied
    out = np.empty(size, np.uint8)
    rows = np.empty((number, _PART_COLUMNS), np.int64)
    touched = np.zeros((number, len(batch.bodies)), np.uint8)
    _write_parts(*given, True, out, rows, touched)
    written = memoryview(out.data)
    parts = [
        BodyPart(
            first + row[PARTITION],
            written[row[OFFSET] : row[OFFSET] + row[LENGTH]],
            row[SPANS],
            bodies,
        )
        for row, bodies in zip(rows.tolist(), _numbers(touched), strict=True)
    ]
    return parts, set(np.flatnonzero(too_large).tolist())


def _numbers(touched: Bytes) -> list[list[int]]:
    """The columns that are not 0, for each row."""
    if touched.shape[1] == 1:
        return [[0]] * len(touched)
    rows, columns = np.nonzero(touched)
    ends = np.cumsum(np.bincount(rows, minlength=len(touched))).tolist()
    numbers = columns.tolist()
    return [numbers[start:end] for start, end in pairwise([0, *ends])]


@lean_kernel
def _copy_head(buf: Bytes, start: int, end: int, without: int, heads: Bytes, at: int) -> int:
    """Copy the fields of the message at ``start`` .. ``end``, except those with the tag
    ``without``, to ``at``; returns the position after them."""
    pos = start
    first = start  # of the fields that are not copied yet
    while pos < end:
        field = pos
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return at
        pos = skip(buf, pos, end, tag)
        if pos < 0:
            return at
        if tag == without:
            if first < field:
                at = copy_bytes(buf, first, field, heads, at)
            first = pos
    if first < end:
        at = copy_bytes(buf, first, end, heads, at)
    return at


@lean_kernel
def _copy_heads(
    buf: Bytes, spans: Rows, resources: Rows, heads: Bytes, resource_heads: Rows, scope_heads: Rows
) -> None:
    """Collect what resources and scopes have besides scopes and spans."""
    at = 0
    row = 0
    for resource in range(resources.shape[0]):
        start = resources[resource, RESOURCE_OFF]
        end = start + resources[resource, RESOURCE_LEN]
        resource_heads[resource, _START] = at
        at = _copy_head(buf, start, end, SCOPE_SPANS, heads, at)
        resource_heads[resource, _END] = at
        pos = start
        while pos < end:
            tag, pos = read_tag(buf, pos, end)
            if pos < 0:
                return
            if tag != SCOPE_SPANS:
                pos = skip(buf, pos, end, tag)
                if pos < 0:
                    return
                continue
            length, pos = read_length(buf, pos, end)
            if pos < 0:
                return
            after = pos + length
            if row < spans.shape[0] and spans[row, MSG_OFF] < after:
                scope = spans[row, SCOPE]
                scope_heads[scope, _START] = at
                at = _copy_head(buf, pos, after, SPAN, heads, at)
                scope_heads[scope, _END] = at
                while row < spans.shape[0] and spans[row, SCOPE] == scope:
                    row += 1
            pos = after


@lean_kernel
def _find_too_large(
    spans: Rows, resource_heads: Rows, scope_heads: Rows, most_bytes: int, too_large: Bytes
) -> None:
    for row in range(spans.shape[0]):
        resource, scope = spans[row, RESOURCE], spans[row, SCOPE]
        length = spans[row, MSG_LEN]
        size = 2 * HEAD + _head_size(length) + length
        size += resource_heads[resource, _END] - resource_heads[resource, _START]
        size += scope_heads[scope, _END] - scope_heads[scope, _START]
        if size > most_bytes:
            too_large[spans[row, BODY]] = 1


@lean_kernel
def _order(spans: Rows, seed: int, starts: Rows, order: Rows) -> None:
    """Sort the rows of spans by partition, stably: those of partition p are in ``order`` from
    ``starts[p]`` to ``starts[p + 1]``."""
    partitions = starts.shape[0] - 1
    for row in range(spans.shape[0]):
        starts[1 + partition(seed, spans[row, TRACE_HI], spans[row, TRACE_LO], partitions)] += 1
    for p in range(partitions):
        starts[p + 1] += starts[p]
    for k in range(spans.shape[0]):  # from the last, so that starts ends up right
        row = spans.shape[0] - 1 - k
        p = partition(seed, spans[row, TRACE_HI], spans[row, TRACE_LO], partitions)
        starts[p + 1] -= 1
        order[starts[p + 1]] = row
    for p in range(partitions):
        starts[p] = starts[p + 1]
    starts[partitions] = spans.shape[0]


@lean_kernel
def _write_parts(
    buf: Bytes,
    spans: Rows,
    heads: Bytes,
    resource_heads: Rows,
    scope_heads: Rows,
    too_large: Bytes,
    starts: Rows,
    order: Rows,
    usual_bytes: int,
    writes: bool,
    out: Bytes,
    parts: Rows,
    touched: Bytes,
) -> tuple[int, int]:
    """Write all parts; returns their number and size. Without ``writes``, only these."""
    at = 0
    number = 0
    for p in range(starts.shape[0] - 1):
        first = at  # of the part
        count = 0
        resource = scope = -1
        resource_at = scope_at = 0
        for k in range(starts[p], starts[p + 1]):
            row = order[k]
            if too_large[spans[row, BODY]]:
                continue
            new_resource, new_scope = spans[row, RESOURCE], spans[row, SCOPE]
            head_start = resource_heads[new_resource, _START]
            head_end = resource_heads[new_resource, _END]
            scope_start = scope_heads[new_scope, _START]
            scope_end = scope_heads[new_scope, _END]
            start = spans[row, MSG_OFF]
            length = spans[row, MSG_LEN]
            need = _head_size(length) + length
            if new_scope != scope:
                need += HEAD + scope_end - scope_start
            if new_resource != resource:
                need += HEAD + head_end - head_start
            full = count > 0 and at - first + need > usual_bytes
            if writes and scope >= 0 and (full or new_scope != scope):
                put_head(out, scope_at, SCOPE_SPANS, at)
            if writes and resource >= 0 and (full or new_resource != resource):
                put_head(out, resource_at, RESOURCE_SPANS, at)
            if full:
                if writes:
                    _put_part(parts, number, p, first, at, count)
                number += 1
                first = at
                count = 0
                resource = scope = -1
            if new_resource != resource:
                resource = new_resource
                resource_at = at
                at += HEAD
                if writes:
                    copy_bytes(heads, head_start, head_end, out, at)
                at += head_end - head_start
            if new_scope != scope:
                scope = new_scope
                scope_at = at
                at += HEAD
                if writes:
                    copy_bytes(heads, scope_start, scope_end, out, at)
                at += scope_end - scope_start
            if writes:
                copy_bytes(buf, start, start + length, out, _put_span_head(out, at, length))
                touched[number, spans[row, BODY]] = 1
            at += _head_size(length) + length
            count += 1
        if count > 0:
            if writes:
                put_head(out, scope_at, SCOPE_SPANS, at)
                put_head(out, resource_at, RESOURCE_SPANS, at)
                _put_part(parts, number, p, first, at, count)
            number += 1
    return number, at


@lean_kernel
def _head_size(length: int) -> int:
    """Bytes of a span's tag and length."""
    size = 2
    while length >= 0x80:
        length >>= 7
        size += 1
    return size


@lean_kernel
def _put_span_head(out: Bytes, at: int, length: int) -> int:
    """Write a span's tag and length; returns the position after them."""
    out[at] = SPAN
    at += 1
    while length >= 0x80:
        out[at] = (length & 0x7F) | 0x80
        length >>= 7
        at += 1
    out[at] = length
    return at + 1


@lean_kernel
def _put_part(parts: Rows, number: int, p: int, first: int, end: int, count: int) -> None:
    parts[number, PARTITION] = p
    parts[number, OFFSET] = first
    parts[number, LENGTH] = end - first
    parts[number, SPANS] = count


def warm_up() -> None:
    """Compile the kernels that split, or load them from the cache on disk."""
    split(scan_bodies("warm-up", [sample()]), 2, 1 << 10)
