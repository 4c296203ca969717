"""The kernel that turns OTLP JSON into protobuf wire bytes in one pass.

One loop walks the messages with an explicit stack; all other values are read by
:mod:`betrace.service.otlp.json_emit`, or skipped (:mod:`betrace.service.otlp.json_lex`) if no
field has their name. A message's length is written when it ends, in bytes reserved for it. They
may be more than it needs, which protobuf allows; attributes get one byte, because the scanner is
fastest with that.

A value that its field does not allow is noted, if it is the first, and skipped, because whatever
follows decides whether the text is JSON at all. Two things that nobody sends need a second pass,
over an edited copy of the text: names that an object has twice, of which the last counts, and
escapes in numbers and ids.
"""

from __future__ import annotations

from betrace.service.jit import general_kernel
from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.json_emit import (
    ESCAPED,
    close_length,
    put_scalar,
    put_string,
    put_tag,
    unescape,
)
from betrace.service.otlp.json_fields import (
    ANY_VALUE,
    BOOL,
    CHILD_SHIFT,
    DOUBLE,
    FIRST_FACTOR,
    HASHES,
    INT64,
    KEY_VALUE,
    LAST_FACTOR,
    MESSAGE,
    NAME_BY_HASH,
    NAME_COUNT,
    NAME_LENGTHS,
    NAME_SHIFT,
    NAME_STRIDE,
    NAME_TEXTS,
    REPEATED_MESSAGE,
    REPEATED_STRING,
    REQUEST,
    RESOURCE_SPANS,
    SCOPE_SPANS,
    SLOT_SHIFT,
    SLOTS,
    SPAN,
    STRING,
    TABLE,
    TAG_SHIFT,
    UNKNOWN,
    packed,
)
from betrace.service.otlp.json_lex import (
    CLOSE_ARRAY,
    CLOSE_OBJECT,
    COLON,
    COMMA,
    CONTAINERS,
    LETTER_N,
    OPEN_ARRAY,
    OPEN_OBJECT,
    QUOTE,
    SYNTAX,
    TOO_DENSE,
    count_container,
    literal_end,
    skip_space,
    skip_value,
    string_end,
)
from betrace.service.otlp.primitives import int64, load64, same_bytes
from betrace.service.otlp.scanner import MAX_DEPTH

# Errors of values, after those of json_lex and json_emit.
NOT_OBJECT = 5
NOT_ARRAY = 6
TOO_DEEP = 7
SEVERAL_VALUES = 8

# Entries of info, after CONTAINERS.
(
    LENGTH,  # bytes written
    EDITS,  # to be made in the text, after which it must be read again
    ERROR,  # the first error, 0 for none
    ERROR_OFF,  # the value it is about
    ERROR_DEPTH,  # the steps to it are path[0] .. path[ERROR_DEPTH]
    ERROR_FIELD,  # the packed field of the last step, if any
    ERROR_GIVEN,  # for SEVERAL_VALUES: the slots given, as bits; the offsets of their names follow
) = range(1, 8)
INFO = 8 + SLOTS

# Columns of path: a name's number, and the index in the array that is its value or -1.
PATH_NAME, PATH_INDEX = range(2)
PATH_COLUMNS = 2

# Columns of stack, a row for each message that is open.
(
    _MESSAGE,
    _START,  # offset of its {
    _LENGTH_AT,  # where its length goes
    _WIDTH,  # bytes reserved for its length
    _FIELD,  # the field being read
    _INDEX,  # in that field's array; -1 outside
    _GIVEN,  # slots with a value, as bits
) = range(7)
STACK_COLUMNS = 7
FRAMES = MAX_DEPTH + 1

_SHALLOW = 16  # below, lengths may outgrow the bytes reserved for them, which moves the content


def _word(text: bytes) -> int:
    return int.from_bytes(text, "little", signed=True)


_KEY = _word(b'{"key":"')
_VALUE = _word(b',"value"')
_BRACE = _word(b':{"')
_STRING_VALUE = _word(b"stringVa"), _word(b'Value":"')
_INT_VALUE = _word(b"intValue")
_BOOL_VALUE = _word(b"boolValu")
_DOUBLE_VALUE = _word(b"doubleVa")
_AFTER_BOOL = _word(b'e":')
_AFTER_DOUBLE = _word(b'lue":')
_AFTER_INT = _word(b'":')
_TAG_MASK = 0xFFFF

_PLAIN_ROOM = 64  # bytes that must follow where the shortcut looks ahead

_INT_FIELD = packed(ANY_VALUE, "intValue")
_BOOL_FIELD = packed(ANY_VALUE, "boolValue")
_DOUBLE_FIELD = packed(ANY_VALUE, "doubleValue")
_INT_TAG = _INT_FIELD >> TAG_SHIFT & _TAG_MASK
_BOOL_TAG = _BOOL_FIELD >> TAG_SHIFT & _TAG_MASK
_DOUBLE_TAG = _DOUBLE_FIELD >> TAG_SHIFT & _TAG_MASK


@general_kernel
def _plain_attribute(buf: Bytes, pos: int, out: Bytes, at: int, tag: int) -> tuple[int, int]:
    """Write the ``KeyValue`` at ``pos`` if it looks as every exporter writes it: a key, then one
    simple value, no space. Return the positions after it, the first -1 if it does not."""
    most = buf.shape[0] - _PLAIN_ROOM
    if pos > most or load64(buf, pos) != _KEY:
        return -1, at
    at = put_tag(out, at, tag)
    length_at = at
    out[at + 1] = 0x0A
    pos, at = put_string(buf, pos + 8, out, at + 2)
    if pos < 0 or pos > most:
        return -1, at
    if load64(buf, pos) != _VALUE or load64(buf, pos + 8) & 0xFFFFFF != _BRACE:
        return -1, at
    pos += 11
    out[at] = 0x12
    value_at = at + 1
    at += 2
    head = load64(buf, pos)
    if head == _STRING_VALUE[0]:
        if load64(buf, pos + 6) != _STRING_VALUE[1]:
            return -1, at
        out[at] = 0x0A
        pos, at = put_string(buf, pos + 14, out, at + 1)
    elif head == _INT_VALUE:
        if load64(buf, pos + 8) & 0xFFFF != _AFTER_INT:
            return -1, at
        pos, at = put_scalar(buf, pos + 10, out, at, INT64, _INT_TAG)
    elif head == _BOOL_VALUE:
        if load64(buf, pos + 8) & 0xFFFFFF != _AFTER_BOOL:
            return -1, at
        pos, at = put_scalar(buf, pos + 11, out, at, BOOL, _BOOL_TAG)
    elif head == _DOUBLE_VALUE:
        if load64(buf, pos + 8) & 0xFFFFFFFFFF != _AFTER_DOUBLE:
            return -1, at
        pos, at = put_scalar(buf, pos + 13, out, at, DOUBLE, _DOUBLE_TAG)
    else:
        return -1, at
    if (
        pos < 0
        or pos + 2 > buf.shape[0]
        or buf[pos] != CLOSE_OBJECT
        or buf[pos + 1] != CLOSE_OBJECT
    ):
        return -1, at
    at = close_length(out, value_at, 1, at)
    return pos + 2, close_length(out, length_at, 1, at)


@general_kernel
def _find_field(text: Bytes, start: int, end: int, message: int) -> int:
    """Return the packed field of a message with the name ``start`` .. ``end``; 0 for none."""
    length = end - start
    if length <= 0:
        return int64(UNKNOWN)
    key = length + FIRST_FACTOR * int64(text[start]) + LAST_FACTOR * int64(text[end - 1])
    name = NAME_BY_HASH[key % HASHES]
    if name < 0 or NAME_LENGTHS[name] != length:
        return int64(UNKNOWN)
    if not same_bytes(text, start, NAME_TEXTS, name * NAME_STRIDE, length):
        return int64(UNKNOWN)
    return TABLE[message * NAME_COUNT + name]  # type: ignore[no-any-return]


@general_kernel
def _width(message: int, depth: int) -> int:
    """Return how many bytes to reserve for the length of a message at a depth."""
    if message == RESOURCE_SPANS or message == SCOPE_SPANS or depth > _SHALLOW:
        return 4
    if message == SPAN:
        return 2
    return 1


@general_kernel
def _note(
    code: int, off: int, depth: int, field: int, index: int, stack: Rows, path: Rows, info: Rows
) -> None:
    """Note an error, if it is the first, with the way to it; ``field`` and ``index`` are the last
    step, in the message at ``depth``."""
    if info[ERROR] != 0:
        return
    info[ERROR] = code
    info[ERROR_OFF] = off
    info[ERROR_DEPTH] = depth
    info[ERROR_FIELD] = field
    for k in range(depth):
        path[k, PATH_NAME] = stack[k, _FIELD] >> NAME_SHIFT
        path[k, PATH_INDEX] = stack[k, _INDEX]
    if depth >= 0:
        path[depth, PATH_NAME] = field >> NAME_SHIFT
        path[depth, PATH_INDEX] = index


@general_kernel
def _note_several(
    start: int, depth: int, given: int, seen: Rows, stack: Rows, path: Rows, info: Rows
) -> None:
    """Note that the ``AnyValue`` at ``depth`` has several values."""
    if info[ERROR] != 0:
        return
    field, index = stack[depth - 1, _FIELD], stack[depth - 1, _INDEX]
    _note(SEVERAL_VALUES, start, depth - 1, field, index, stack, path, info)
    info[ERROR_GIVEN] = given
    for slot in range(SLOTS):
        info[ERROR_GIVEN + 1 + slot] = seen[depth, slot]


@general_kernel
def _member_end(buf: Bytes, pos: int, opened: Rows, info: Rows) -> int:
    """Return the position after the comma that follows the member whose name is at ``pos``, all
    of which was read before."""
    end, _ = string_end(buf, pos + 1)
    pos = skip_space(buf, end + 1)
    containers = info[CONTAINERS]
    pos = skip_value(buf, pos + 1, 0, opened, info)
    info[CONTAINERS] = containers
    return skip_space(buf, pos) + 1


@general_kernel
def transcode(
    buf: Bytes,
    out: Bytes,
    stack: Rows,
    seen: Rows,
    opened: Rows,
    edits: Rows,
    path: Rows,
    info: Rows,
) -> int:
    """Write the ``ExportTraceServiceRequest`` in ``buf`` to ``out`` (``2 * len(buf) + 64`` bytes).

    Returns 0, ``SYNTAX`` or ``TOO_DENSE``. With 0, ``info`` says whether there was an error, and
    how many edits the text needs; if any, neither ``out`` nor the error counts. As many of them
    as fit are in ``edits``, for :func:`edit`.

    Scratch: ``stack`` (``FRAMES``, ``STACK_COLUMNS``), ``seen`` (``FRAMES``, ``SLOTS``) filled with
    -1, ``opened`` (``MAX_LEVELS``).
    """
    n = buf.shape[0]
    info[:] = 0
    at = 0
    depth = 0
    levels = 0  # objects and arrays open around the present value
    message = REQUEST
    start = 0  # of the present message
    field = int64(0)
    index = -1
    given = int64(0)
    fresh = True  # an object or array was just opened

    pos = skip_space(buf, 0)
    if pos >= n or buf[pos] != OPEN_OBJECT:
        _note(NOT_OBJECT, pos, -1, 0, -1, stack, path, info)
        pos = skip_value(buf, pos, 0, opened, info)
        if pos < 0:
            return -pos
        return 0 if skip_space(buf, pos) == n else SYNTAX
    start = pos
    pos += 1
    levels = 1
    while True:
        pos = skip_space(buf, pos)
        if pos >= n:
            return SYNTAX
        c = int64(buf[pos])
        if index >= 0:
            if c == CLOSE_ARRAY:
                index = -1
                levels -= 1
                fresh = False
                pos += 1
                continue
            if not fresh:
                if c != COMMA:
                    return SYNTAX
                index += 1
                pos = skip_space(buf, pos + 1)
                if pos >= n:
                    return SYNTAX
        else:
            if c == CLOSE_OBJECT:
                pos += 1
                levels -= 1
                fresh = False
                if depth == 0:
                    break
                at = close_length(out, stack[depth, _LENGTH_AT], stack[depth, _WIDTH], at)
                if message == ANY_VALUE and given & (given - 1):
                    _note_several(start, depth, given, seen, stack, path, info)
                depth -= 1
                message = stack[depth, _MESSAGE]
                start = stack[depth, _START]
                field = stack[depth, _FIELD]
                index = stack[depth, _INDEX]
                given = stack[depth, _GIVEN]
                continue
            if not fresh:
                if c != COMMA:
                    return SYNTAX
                pos = skip_space(buf, pos + 1)
                if pos >= n:
                    return SYNTAX
                c = int64(buf[pos])
            if c != QUOTE:
                return SYNTAX
            name = pos
            end, escaped = string_end(buf, pos + 1)
            if end < 0:
                return SYNTAX
            if escaped:
                field = _find_field(out, at, unescape(buf, pos + 1, end, out, at), message)
            else:
                field = _find_field(buf, pos + 1, end, message)
            pos = skip_space(buf, end + 1)
            if pos >= n or buf[pos] != COLON:
                return SYNTAX
            pos = skip_space(buf, pos + 1)
            if pos >= n:
                return SYNTAX
            c = int64(buf[pos])
            fresh = False
            if field == UNKNOWN:
                pos = skip_value(buf, pos, levels, opened, info)
                if pos < 0:
                    return -pos
                continue
            slot = field >> SLOT_SHIFT & 0xFF
            if seen[depth, slot] > start:
                if info[EDITS] < edits.shape[0]:
                    before = seen[depth, slot]
                    edits[info[EDITS], 0] = before
                    edits[info[EDITS], 1] = _member_end(buf, before, opened, info)
                info[EDITS] += 1
            seen[depth, slot] = name
            if c == LETTER_N:
                pos = literal_end(buf, pos)
                if pos < 0:
                    return SYNTAX
                continue
            given |= 1 << slot
            kind = field & 0xFF
            if kind == REPEATED_MESSAGE or kind == REPEATED_STRING:
                if c == OPEN_ARRAY:
                    info[CONTAINERS] += 1
                    levels += 1
                    index = 0
                    fresh = True
                    pos += 1
                    continue
                _note(NOT_ARRAY, pos, depth, field, -1, stack, path, info)
                pos = skip_value(buf, pos, levels, opened, info)
                if pos < 0:
                    return -pos
                continue

        fresh = False
        kind = field & 0xFF
        tag = field >> TAG_SHIFT & _TAG_MASK
        if kind == REPEATED_MESSAGE or kind == MESSAGE:
            child = field >> CHILD_SHIFT & 0xFF
            code = 0
            if depth >= MAX_DEPTH:
                code = TOO_DEEP
            elif buf[pos] != OPEN_OBJECT:
                code = NOT_OBJECT
            if code:
                _note(code, pos, depth, field, index, stack, path, info)
                pos = skip_value(buf, pos, levels, opened, info)
                if pos < 0:
                    return -pos
                continue
            if not count_container(pos, info):
                return TOO_DENSE
            if child == KEY_VALUE and depth + 2 <= MAX_DEPTH:
                after, after_at = _plain_attribute(buf, pos, out, at, tag)
                if after >= 0:
                    info[CONTAINERS] += 1
                    pos = after
                    at = after_at
                    continue
            stack[depth, _MESSAGE] = message
            stack[depth, _START] = start
            stack[depth, _FIELD] = field
            stack[depth, _INDEX] = index
            stack[depth, _GIVEN] = given
            depth += 1
            levels += 1
            at = put_tag(out, at, tag)
            width = _width(child, depth)
            stack[depth, _LENGTH_AT] = at
            stack[depth, _WIDTH] = width
            at += width
            message = child
            start = pos
            index = -1
            given = int64(0)
            fresh = True
            pos += 1
            continue
        if kind == REPEATED_STRING:
            kind = STRING
        after, after_at = put_scalar(buf, pos, out, at, kind, tag)
        if after == -SYNTAX:
            return SYNTAX
        if after < 0:
            if after == -ESCAPED:
                if info[EDITS] < edits.shape[0]:
                    edits[info[EDITS], 0] = pos + 1
                    edits[info[EDITS], 1] = -string_end(buf, pos + 1)[0]
                info[EDITS] += 1
            else:
                _note(-after, pos, depth, field, index, stack, path, info)
            pos = skip_value(buf, pos, levels, opened, info)
            if pos < 0:
                return -pos
            continue
        pos = after
        at = after_at

    info[LENGTH] = at
    return 0 if skip_space(buf, pos) == n else SYNTAX


@general_kernel
def edit(buf: Bytes, edits: Rows, text: Bytes) -> None:
    """Make edits in ``text``, a copy of ``buf``, without moving anything.

    An edit is a range to overwrite with spaces, or, if its end is negative, a string's content to
    write without escapes.
    """
    for row in range(edits.shape[0]):
        start = edits[row, 0]
        end = edits[row, 1]
        if end < 0:
            end = 1 - end
            start = unescape(buf, start, end - 1, text, start)
            text[start] = QUOTE
            start += 1
        for pos in range(start, end):
            text[pos] = 0x20
