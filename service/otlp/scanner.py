"""The kernel that scans ``ExportTraceServiceRequest`` messages into rows.

One loop walks a body field by field, with the enclosing messages on an explicit stack of at most
``MAX_DEPTH`` entries. A table gives the meaning of a field by message type and tag, so a tag with
an unexpected wire type is an unknown field, as in the protobuf library. Everything is validated as
the library does it, even if no column stores it: lengths, varints, groups, UTF-8 of all strings,
nesting.

An attribute in the shape that exporters write (a key, then one value, lengths below 128) is
checked by a straight-line shortcut, :func:`_plain_key_value`. All others go through the loop.
"""

from __future__ import annotations

import numpy as np

from betrace.service.jit import general_kernel
from betrace.service.otlp.attributes import (
    BOOL,
    LENGTH,
    SPAN_ATTRIBUTES,
    STRING,
    VALUE,
    find_attribute,
    find_resource_attribute,
)
from betrace.service.otlp.columns import (
    BODY,
    COMPLETE,
    END,
    ERROR,
    ERROR_OFF,
    FIRST_SPAN,
    FLAGS,
    HAS_PARENT,
    KIND,
    MESSAGE_LEN,
    MESSAGE_OFF,
    MSG_LEN,
    MSG_OFF,
    NAME_HASH,
    NAME_LEN,
    NAME_OFF,
    PARENT_ID,
    REJECTED_SPAN_ID,
    REJECTED_TRACE_ID,
    RESOURCE,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SCOPE,
    SCOPE_NAME_LEN,
    SCOPE_NAME_OFF,
    SERVICE_LEN,
    SERVICE_OFF,
    SPAN_COUNT,
    SPAN_ID,
    START,
    STATUS,
    TRACE_HI,
    TRACE_LO,
    Bytes,
    Rows,
)
from betrace.service.otlp.primitives import (
    BAD_GROUP,
    BAD_TAG,
    BAD_UTF8,
    BAD_WIRE_TYPE,
    BYTES_TYPE,
    END_GROUP,
    FIXED32,
    FIXED64,
    START_GROUP,
    TOO_DEEP,
    TRUNCATED,
    VARINT,
    hash_bytes,
    int64,
    is_ascii,
    is_utf8,
    load64,
    load64_big,
    read_length,
    read_tag,
    read_varint,
    same_bytes,
)
from betrace.service.otlp.schema import (
    CODE_FIELD,
    END_FIELD,
    GROUP_TYPE,
    KEY_FIELD,
    KEY_VALUE_TYPE,
    KIND_FIELD,
    MESSAGE_FIELD,
    NAME_FIELD,
    OPERATIONS,
    PARENT_ID_FIELD,
    PLAIN_FIELD,
    REQUEST_TYPE,
    RESOURCE_SPANS_TYPE,
    SCOPE_NAME_FIELD,
    SCOPE_SPANS_TYPE,
    SPAN_ID_FIELD,
    SPAN_TYPE,
    START_FIELD,
    SUBMESSAGE,
    TAGS,
    TEXT_FIELD,
    TRACE_ID_FIELD,
)

MAX_DEPTH = 100  # nested messages and groups below the request: the protobuf library's limit

# Columns of the stack: of the message around the current one.
_STACK_END, _STACK_TYPE, _STACK_GROUP = range(3)
STACK_COLUMNS = 3

# Entries of counts: rows in use.
SPANS, RESOURCES, SCOPES = range(3)
COUNTS = 3

_COMPLETE_TEXT = b"trace.complete"
_COMPLETE_KEY = np.frombuffer(_COMPLETE_TEXT, np.uint8)
_COMPLETE_LEN = len(_COMPLETE_TEXT)
_COMPLETE_HEAD = int.from_bytes(_COMPLETE_TEXT[:8], "little", signed=True)
_SERVICE_KEY = np.frombuffer(b"service.name", np.uint8)
_SERVICE_LEN = len(_SERVICE_KEY)
_TRUE = np.frombuffer(b"true", np.uint8)

_INT64_MAX = 2**63 - 1

# Results of _plain_key_value.
_NOT_PLAIN, _GOOD, _GOOD_COMPLETE = range(3)

OVERFLOW = -1  # scan: more rows are needed than the arrays have


@general_kernel
def _plain_key_value(buf: Bytes, pos: int, end: int) -> int:
    """Check the ``KeyValue`` at ``pos`` .. ``end`` if it has the usual shape.

    Returns ``_GOOD`` if it is valid, ``_GOOD_COMPLETE`` if its key may also be trace.complete, or
    ``_NOT_PLAIN`` if undecided.
    """
    if end - pos < 6 or buf[pos] != 0x0A:
        return _NOT_PLAIN
    key_len = int64(buf[pos + 1])
    value = pos + 2 + key_len
    if key_len >= 0x80 or value + 4 > end or buf[value] != 0x12:
        return _NOT_PLAIN
    item = value + 2
    value_len = int64(buf[value + 1])
    if value_len >= 0x80 or item + value_len != end:
        return _NOT_PLAIN
    tag = buf[item]
    if tag == 0x0A:
        text_len = int64(buf[item + 1])
        if text_len >= 0x80 or item + 2 + text_len != end:
            return _NOT_PLAIN
        # Tags and lengths here are below 128, so one ASCII check covers both strings.
        if not is_ascii(buf, pos, end) and not (
            is_utf8(buf, pos + 2, value) and is_utf8(buf, item + 2, end)
        ):
            return _NOT_PLAIN
    else:
        if tag == 0x18 or tag == 0x10:
            _, after = read_varint(buf, item + 1, end)
            if after != end:
                return _NOT_PLAIN
        elif tag != 0x21 or item + 9 != end:
            return _NOT_PLAIN
        if not is_utf8(buf, pos + 2, value):
            return _NOT_PLAIN
    if key_len == _COMPLETE_LEN and load64(buf, pos + 2) == _COMPLETE_HEAD:
        return _GOOD_COMPLETE
    return _GOOD


@general_kernel
def _is_complete(buf: Bytes, off: int, length: int, out: Rows) -> bool:
    """Whether the span at ``off`` has trace.complete = true (bool, or the string "true")."""
    kind = find_attribute(
        buf, off, length, SPAN_ATTRIBUTES, _COMPLETE_KEY, 0, len(_COMPLETE_KEY), out
    )
    if kind == STRING:
        return out[LENGTH] == 4 and same_bytes(buf, out[VALUE], _TRUE, 0, 4)
    return kind == BOOL and out[VALUE] == 1


@general_kernel
def _any_byte(buf: Bytes, off: int, length: int) -> bool:
    end = off + length
    while off < end and buf[off] == 0:
        off += 1
    return off < end


@general_kernel
def _int32(value: int) -> int:
    """``value`` cut to 32 bits, signed: how an enum is read from a varint."""
    low = value & 0xFFFFFFFF
    return low - 0x100000000 if low > 0x7FFFFFFF else low


@general_kernel
def _clamped(value: int) -> int:
    """An unsigned 64-bit value given as int64, limited to the largest int64."""
    return _INT64_MAX if value < 0 else value


@general_kernel
def _put_resource(buf: Bytes, off: int, length: int, resources: Rows, row: int, out: Rows) -> None:
    resources[row, RESOURCE_OFF] = off
    resources[row, RESOURCE_LEN] = length
    resources[row, SERVICE_OFF] = 0
    resources[row, SERVICE_LEN] = -1
    kind = find_resource_attribute(buf, off, length, _SERVICE_KEY, 0, len(_SERVICE_KEY), out)
    if kind == STRING:
        resources[row, SERVICE_OFF] = out[VALUE]
        resources[row, SERVICE_LEN] = out[LENGTH]


@general_kernel
def _scan_body(
    buf: Bytes,
    start: int,
    stop: int,
    body: int,
    spans: Rows,
    resources: Rows,
    scopes: Rows,
    bodies: Rows,
    stack: Rows,
    out: Rows,
    counts: Rows,
) -> tuple[int, int]:
    """Scan the body at ``start`` .. ``stop``. Return (0, 0), or an error code and its position.

    ``counts`` and the body's counts are updated only if there is no error.
    """
    span_row = counts[SPANS]
    resource_row = counts[RESOURCES]
    scope_row = counts[SCOPES]
    in_resource = False  # the current ResourceSpans has a row, resource_row
    in_scope = False  # the current ScopeSpans has a row, scope_row
    bad_trace_ids = 0
    bad_span_ids = 0

    resource_off = resource_end = start
    scope_name_off = scope_name_len = 0
    span_off = span_end = start
    trace_id_off = trace_id_len = 0
    span_id_off = span_id_len = 0
    parent_off = parent_len = 0
    name_off = name_len = 0
    message_off = message_len = 0
    kind = status = start_time = end_time = 0
    maybe_complete = False

    depth = 0
    message = REQUEST_TYPE
    group = 0  # field number of the current group
    pos = start
    end = stop
    while True:
        if pos >= end:
            if message == GROUP_TYPE:
                return BAD_GROUP, pos
            if depth == 0:
                break
            if message == SPAN_TYPE:
                trace_hi = trace_lo = span_id = 0
                if trace_id_len == 16:
                    trace_hi = load64_big(buf, trace_id_off)
                    trace_lo = load64_big(buf, trace_id_off + 8)
                if span_id_len == 8:
                    span_id = load64_big(buf, span_id_off)
                if (trace_hi | trace_lo) == 0:
                    bad_trace_ids += 1
                elif span_id == 0:
                    bad_span_ids += 1
                else:
                    if (
                        span_row >= spans.shape[0]
                        or resource_row >= resources.shape[0]
                        or scope_row >= scopes.shape[0]
                    ):
                        return OVERFLOW, pos
                    in_resource = True
                    in_scope = True
                    flags = 0
                    parent = 0
                    if parent_len == 8:
                        parent = load64_big(buf, parent_off)
                    if parent != 0 or (parent_len != 8 and _any_byte(buf, parent_off, parent_len)):
                        flags = HAS_PARENT
                    if maybe_complete and _is_complete(buf, span_off, span_end - span_off, out):
                        flags |= COMPLETE
                    spans[span_row, TRACE_HI] = trace_hi
                    spans[span_row, TRACE_LO] = trace_lo
                    spans[span_row, SPAN_ID] = span_id
                    spans[span_row, PARENT_ID] = parent
                    spans[span_row, START] = _clamped(start_time)
                    spans[span_row, END] = _clamped(end_time)
                    spans[span_row, NAME_HASH] = hash_bytes(buf, name_off, name_len)
                    spans[span_row, NAME_OFF] = name_off
                    spans[span_row, NAME_LEN] = name_len
                    spans[span_row, KIND] = kind
                    spans[span_row, STATUS] = status
                    spans[span_row, MESSAGE_OFF] = message_off
                    spans[span_row, MESSAGE_LEN] = message_len
                    spans[span_row, FLAGS] = flags
                    spans[span_row, RESOURCE] = resource_row
                    spans[span_row, SCOPE] = scope_row
                    spans[span_row, BODY] = body
                    spans[span_row, MSG_OFF] = span_off
                    spans[span_row, MSG_LEN] = span_end - span_off
                    span_row += 1
            elif message == SCOPE_SPANS_TYPE:
                if in_scope:
                    scopes[scope_row, SCOPE_NAME_OFF] = scope_name_off
                    scopes[scope_row, SCOPE_NAME_LEN] = scope_name_len
                    scope_row += 1
                    in_scope = False
            elif message == RESOURCE_SPANS_TYPE and in_resource:
                length = resource_end - resource_off
                _put_resource(buf, resource_off, length, resources, resource_row, out)
                resource_row += 1
                in_resource = False
            depth -= 1
            end = stack[depth, _STACK_END]
            message = stack[depth, _STACK_TYPE]
            group = stack[depth, _STACK_GROUP]
            continue

        field_off = pos
        tag = int64(buf[pos])
        if tag < 0x80:
            pos += 1
        else:
            tag, pos = read_tag(buf, pos, end)
            if pos < 0:
                return -pos, field_off
        operation = PLAIN_FIELD
        if tag < TAGS:
            operation = OPERATIONS[message * TAGS + tag]
        wire_type = tag & 7

        if wire_type == BYTES_TYPE:
            length, pos = read_length(buf, pos, end)
            if pos < 0:
                return -pos, field_off
            after = pos + length
            if operation >= SUBMESSAGE:
                child = operation - SUBMESSAGE
                if child == KEY_VALUE_TYPE and depth + 2 <= MAX_DEPTH:
                    shape = _plain_key_value(buf, pos, after)
                    if shape != _NOT_PLAIN:
                        if shape == _GOOD_COMPLETE:
                            maybe_complete = True
                        pos = after
                        continue
                if depth >= MAX_DEPTH:
                    return TOO_DEEP, field_off
                stack[depth, _STACK_END] = end
                stack[depth, _STACK_TYPE] = message
                stack[depth, _STACK_GROUP] = group
                depth += 1
                end = after
                message = child
                if child == SPAN_TYPE:
                    span_off = pos
                    span_end = after
                    trace_id_len = span_id_len = parent_len = 0
                    name_off = name_len = message_off = message_len = 0
                    kind = status = start_time = end_time = 0
                    maybe_complete = False
                elif child == SCOPE_SPANS_TYPE:
                    scope_name_off = scope_name_len = 0
                elif child == RESOURCE_SPANS_TYPE:
                    resource_off = pos
                    resource_end = after
                continue
            if operation >= TEXT_FIELD:
                if not is_utf8(buf, pos, after):
                    return BAD_UTF8, field_off
                if operation == NAME_FIELD:
                    name_off = pos
                    name_len = length
                elif operation == KEY_FIELD:
                    if length == _COMPLETE_LEN and load64(buf, pos) == _COMPLETE_HEAD:
                        maybe_complete = True
                elif operation == MESSAGE_FIELD:
                    message_off = pos
                    message_len = length
                elif operation == SCOPE_NAME_FIELD:
                    scope_name_off = pos
                    scope_name_len = length
            elif operation == TRACE_ID_FIELD:
                trace_id_off = pos
                trace_id_len = length
            elif operation == SPAN_ID_FIELD:
                span_id_off = pos
                span_id_len = length
            elif operation == PARENT_ID_FIELD:
                parent_off = pos
                parent_len = length
            elif tag < 8 and message != GROUP_TYPE:
                return BAD_TAG, field_off
            pos = after
        elif wire_type == VARINT:
            value, pos = read_varint(buf, pos, end)
            if pos < 0:
                return -pos, field_off
            if operation == KIND_FIELD:
                kind = _int32(value)
            elif operation == CODE_FIELD:
                status = _int32(value)
            elif tag < 8 and message != GROUP_TYPE:
                return BAD_TAG, field_off
        elif wire_type == FIXED64:
            if end - pos < 8:
                return TRUNCATED, field_off
            if operation == START_FIELD:
                start_time = load64(buf, pos)
            elif operation == END_FIELD:
                end_time = load64(buf, pos)
            elif tag < 8 and message != GROUP_TYPE:
                return BAD_TAG, field_off
            pos += 8
        elif wire_type == FIXED32:
            if end - pos < 4:
                return TRUNCATED, field_off
            if tag < 8 and message != GROUP_TYPE:
                return BAD_TAG, field_off
            pos += 4
        elif wire_type == START_GROUP:
            if tag < 8 and message != GROUP_TYPE:
                return BAD_TAG, field_off
            if depth >= MAX_DEPTH:
                return TOO_DEEP, field_off
            stack[depth, _STACK_END] = end
            stack[depth, _STACK_TYPE] = message
            stack[depth, _STACK_GROUP] = group
            depth += 1
            message = GROUP_TYPE
            group = tag >> 3
        elif wire_type == END_GROUP:
            if message != GROUP_TYPE or group != tag >> 3:
                return BAD_GROUP, field_off
            depth -= 1
            message = stack[depth, _STACK_TYPE]
            group = stack[depth, _STACK_GROUP]
        else:
            return BAD_WIRE_TYPE, field_off

    bodies[body, SPAN_COUNT] = span_row - counts[SPANS]
    bodies[body, REJECTED_TRACE_ID] = bad_trace_ids
    bodies[body, REJECTED_SPAN_ID] = bad_span_ids
    counts[SPANS] = span_row
    counts[RESOURCES] = resource_row
    counts[SCOPES] = scope_row
    return 0, 0


@general_kernel
def scan(
    buf: Bytes,
    starts: Rows,
    spans: Rows,
    resources: Rows,
    scopes: Rows,
    bodies: Rows,
    stack: Rows,
    out: Rows,
    counts: Rows,
) -> int:
    """Scan the bodies in ``buf``, each from ``starts[i]`` to ``starts[i + 1]``.

    Fills the rows, ``counts`` with their numbers, and ``bodies``. ``stack`` is scratch space of
    ``MAX_DEPTH`` rows of ``STACK_COLUMNS``, ``out`` of ``attributes.OUT_SIZE``. Returns 0, or
    ``OVERFLOW`` if the arrays are too small; the results are then invalid.
    """
    counts[:] = 0
    bodies[:] = 0
    for body in range(starts.shape[0] - 1):
        bodies[body, FIRST_SPAN] = counts[SPANS]
        error, error_off = _scan_body(
            buf,
            starts[body],
            starts[body + 1],
            body,
            spans,
            resources,
            scopes,
            bodies,
            stack,
            out,
            counts,
        )
        if error == OVERFLOW:
            return OVERFLOW
        if error != 0:
            bodies[body, ERROR] = error
            bodies[body, ERROR_OFF] = error_off - starts[body]
    return 0
