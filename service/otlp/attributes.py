"""Kernels that find attributes in the bytes of a validated message.

The scanner (:mod:`betrace.service.otlp.scanner`) does not store attributes. They are searched on
demand, in the few spans that a rule's name pattern selected. The bytes must have passed the
scanner; on other bytes these kernels still terminate within bounds, with an arbitrary result.

A value is returned in ``out``, an ``int64[4]``: ``out[TYPE]`` is one of the type constants, and
``out[VALUE]`` and ``out[LENGTH]`` depend on it:

====================================  ==========================  =====================
type                                  value                       length
====================================  ==========================  =====================
``MISSING``                           0                           0
``STRING``, ``BYTES``                 offset in ``buf``           bytes
``BOOL``                              0 or 1                      0
``INT``                               the value                   0
``DOUBLE``                            its 64 bits                 0
``ARRAY`` (an ``ArrayValue``)         offset in ``buf``           bytes
``KVLIST`` (a ``KeyValueList``)       offset in ``buf``           bytes
====================================  ==========================  =====================

Singular fields that occur twice merge as in protobuf (the last one wins; of a oneof, the last
member), with one approximation: of two arrays or two key-value lists in one value, which the
protobuf library concatenates, only the last counts. No exporter writes that. A value that refers to
a string table (``string_value_strindex``, from the profiles signal) is ``MISSING``, because trace
data has no such table.
"""

from __future__ import annotations

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.primitives import (
    BYTES_TYPE,
    END_GROUP,
    FIXED32,
    FIXED64,
    START_GROUP,
    VARINT,
    load64,
    read_length,
    read_tag,
    read_varint,
    same_bytes,
)

MISSING, STRING, BOOL, INT, DOUBLE, ARRAY, KVLIST, BYTES = range(8)

# Indices into out.
TYPE, VALUE, LENGTH = range(3)
OUT_SIZE = 4  # the fourth is unused

SPAN_ATTRIBUTES = 9  # field numbers of the repeated KeyValue
RESOURCE_ATTRIBUTES = 1

# Tags with the wire type in the lower three bits.
_KEY = 1 << 3 | BYTES_TYPE
_KEY_VALUE = 2 << 3 | BYTES_TYPE
_RESOURCE = 1 << 3 | BYTES_TYPE
_ITEM = 1 << 3 | BYTES_TYPE
_STRING = 1 << 3 | BYTES_TYPE
_BOOL = 2 << 3 | VARINT
_INT = 3 << 3 | VARINT
_DOUBLE = 4 << 3 | FIXED64
_ARRAY = 5 << 3 | BYTES_TYPE
_KVLIST = 6 << 3 | BYTES_TYPE
_BYTES = 7 << 3 | BYTES_TYPE
_STRINDEX = 8 << 3 | VARINT


@general_kernel
def skip(buf: Bytes, pos: int, end: int, tag: int) -> int:
    """Return the position after the field whose ``tag`` ends at ``pos``; negative if malformed."""
    open_groups = 0
    while True:
        wire = tag & 7
        if wire == BYTES_TYPE:
            length, pos = read_length(buf, pos, end)
            if pos >= 0:
                pos += length
        elif wire == VARINT:
            _, pos = read_varint(buf, pos, end)
        elif wire == FIXED64:
            pos += 8
        elif wire == FIXED32:
            pos += 4
        elif wire == START_GROUP:
            open_groups += 1
        elif wire == END_GROUP:
            open_groups -= 1
        else:
            return -1
        if pos < 0 or open_groups <= 0:
            return pos
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return pos


@general_kernel
def _put(out: Rows, kind: int, value: int, length: int) -> None:
    out[TYPE] = kind
    out[VALUE] = value
    out[LENGTH] = length


@general_kernel
def merge_any_value(buf: Bytes, pos: int, end: int, out: Rows) -> None:
    """Merge the ``AnyValue`` at ``pos`` .. ``end`` into ``out``."""
    while pos < end:
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return
        if tag in (_STRING, _ARRAY, _KVLIST, _BYTES):
            length, pos = read_length(buf, pos, end)
            if pos < 0:
                return
            number = tag >> 3
            kind = STRING
            if number == 5:
                kind = ARRAY
            elif number == 6:
                kind = KVLIST
            elif number == 7:
                kind = BYTES
            _put(out, kind, pos, length)
            pos += length
        elif tag in (_BOOL, _INT, _STRINDEX):
            value, pos = read_varint(buf, pos, end)
            if tag == _INT:
                _put(out, INT, value, 0)
            elif tag == _BOOL:
                _put(out, BOOL, 1 if value != 0 else 0, 0)
            else:
                _put(out, MISSING, 0, 0)
        elif tag == _DOUBLE:
            if pos > end - 8:
                return
            _put(out, DOUBLE, load64(buf, pos), 0)
            pos += 8
        else:
            pos = skip(buf, pos, end, tag)
        if pos < 0:
            return


@general_kernel
def _key_value(
    buf: Bytes,
    pos: int,
    end: int,
    key_buf: Bytes,
    key_off: int,
    key_len: int,
    out: Rows,
) -> None:
    """Store the value of the ``KeyValue`` at ``pos`` .. ``end`` in ``out`` if it has the key."""
    _put(out, MISSING, 0, 0)
    found_off = pos
    found_len = 0
    at = pos
    while at < end:
        tag, at = read_tag(buf, at, end)
        if at < 0:
            return
        if tag == _KEY:
            found_len, found_off = read_length(buf, at, end)
            if found_off < 0:
                return
            at = found_off + found_len
            # Usually the key comes first: for another key, the value need not be read.
            if at < end and buf[at] == _KEY_VALUE and found_len != key_len:
                after_len, after = read_length(buf, at + 1, end)
                if after >= 0 and after + after_len == end:
                    return
        else:
            at = skip(buf, at, end, tag)
            if at < 0:
                return
    if found_len != key_len:
        return
    if not same_bytes(buf, found_off, key_buf, key_off, key_len):
        return
    at = pos
    while at < end:
        tag, at = read_tag(buf, at, end)
        if at < 0:
            return
        if tag == _KEY_VALUE:
            length, at = read_length(buf, at, end)
            if at < 0:
                return
            merge_any_value(buf, at, at + length, out)
            at += length
        else:
            at = skip(buf, at, end, tag)
            if at < 0:
                return


@general_kernel
def find_attribute(
    buf: Bytes,
    off: int,
    length: int,
    field: int,
    key_buf: Bytes,
    key_off: int,
    key_len: int,
    out: Rows,
) -> int:
    """Find the first attribute with a key and a value in the message at ``off``.

    ``field`` is the number of the message's repeated ``KeyValue`` field: ``SPAN_ATTRIBUTES``
    or ``RESOURCE_ATTRIBUTES``. The key is the ``key_len`` bytes of ``key_buf`` from
    ``key_off``. Returns the type (``MISSING`` if not found) and fills ``out``. Attributes
    without a value (an absent or empty ``AnyValue``) are skipped.
    """
    _put(out, MISSING, 0, 0)
    wanted = field << 3 | BYTES_TYPE
    end = off + length
    pos = off
    while pos < end:
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            break
        if tag == wanted:
            size, pos = read_length(buf, pos, end)
            if pos < 0:
                break
            _key_value(buf, pos, pos + size, key_buf, key_off, key_len, out)
            found: int = out[TYPE]
            if found != MISSING:
                return found
            pos += size
        else:
            pos = skip(buf, pos, end, tag)
            if pos < 0:
                break
    return MISSING


@general_kernel
def find_resource_attribute(
    buf: Bytes,
    resource_off: int,
    resource_len: int,
    key_buf: Bytes,
    key_off: int,
    key_len: int,
    out: Rows,
) -> int:
    """Like :func:`find_attribute`, for the resource of the ``ResourceSpans`` at ``resource_off``.

    The offsets are a resource row's ``RESOURCE_OFF`` and ``RESOURCE_LEN``. All occurrences of
    the resource field are searched in order, because protobuf merges them.
    """
    _put(out, MISSING, 0, 0)
    end = resource_off + resource_len
    pos = resource_off
    while pos < end:
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            break
        if tag == _RESOURCE:
            size, pos = read_length(buf, pos, end)
            if pos < 0:
                break
            find_attribute(buf, pos, size, RESOURCE_ATTRIBUTES, key_buf, key_off, key_len, out)
            found: int = out[TYPE]
            if found != MISSING:
                return found
            pos += size
        else:
            pos = skip(buf, pos, end, tag)
            if pos < 0:
                break
    return MISSING


@general_kernel
def next_array_item(buf: Bytes, off: int, length: int, cursor: int, out: Rows) -> int:
    """Store the next item of the ``ArrayValue`` at ``off`` in ``out``; return the next cursor.

    The first cursor is 0. After the last item, returns -1 and ``out`` is ``MISSING``. An item
    without a value is ``MISSING`` too, so the cursor marks the end, not the type.
    """
    _put(out, MISSING, 0, 0)
    end = off + length
    pos = off + cursor
    while pos < end:
        tag, pos = read_tag(buf, pos, end)
        if pos < 0:
            return -1
        if tag == _ITEM:
            size, pos = read_length(buf, pos, end)
            if pos < 0:
                return -1
            merge_any_value(buf, pos, pos + size, out)
            return pos + size - off
        pos = skip(buf, pos, end, tag)
        if pos < 0:
            return -1
    return -1
