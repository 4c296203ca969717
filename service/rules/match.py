"""Whether a span satisfies a predicate: a kernel, and plain Python for the remaining cases.

The kernel runs the programs of :mod:`betrace.service.rules.program` on the received bytes. It
decides comparisons of integers, doubles, bools and plain text. For regular expressions, membership
in arrays, and numbers written in unusual ways it returns ``ASK``, and :func:`evaluate` decides: it
reads the few attributes it needs and compares them with the Python functions that the programs
were built with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue

from betrace.service.jit import lean_kernel
from betrace.service.otlp.attributes import (
    ARRAY,
    BOOL,
    BYTES,
    DOUBLE,
    INT,
    LENGTH,
    MISSING,
    OUT_SIZE,
    SPAN_ATTRIBUTES,
    STRING,
    TYPE,
    VALUE,
    find_attribute,
    find_resource_attribute,
)
from betrace.service.otlp.columns import END as SPAN_END
from betrace.service.otlp.columns import (
    KIND,
    MESSAGE_LEN,
    MESSAGE_OFF,
    MSG_LEN,
    MSG_OFF,
    NAME_LEN,
    NAME_OFF,
    RESOURCE,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SCOPE,
    SCOPE_NAME_LEN,
    SCOPE_NAME_OFF,
    SERVICE_LEN,
    SERVICE_OFF,
    START,
    STATUS,
    Bytes,
    Rows,
    SpanBatch,
)
from betrace.service.otlp.primitives import same_bytes
from betrace.service.rules.exact import compare_literals, truthy
from betrace.service.rules.patterns import PatternSearch, Pay, search
from betrace.service.rules.program import (
    ANY,
    CONTAINS,
    END,
    EQ,
    FIELD,
    GE,
    GT,
    IF_FALSE,
    IF_MISSING,
    IF_TRUE,
    INT_MAX,
    JUMP_FALSE,
    JUMP_TRUE,
    L_FLOAT_HI,
    L_FLOAT_LO,
    L_INT_HI,
    L_INT_LO,
    L_KEY_LEN,
    L_KEY_OFF,
    L_NUMERIC,
    L_OP,
    L_OUTCOMES,
    L_SCOPE,
    L_TEXT_LEN,
    L_TEXT_OFF,
    LE,
    LEAF,
    LT,
    NE,
    NEGATE,
    NUMBER,
    TRUTHY,
)
from betrace.service.rules.syntax import (
    KINDS,
    STATUSES,
    And,
    Attribute,
    Compare,
    Node,
    Not,
    Or,
    Scope,
    Truthy,
)
from betrace.service.rules.values import AttributeValue, value_text

NO, YES, ASK = range(3)

# span: fields, in the order of syntax.FIELDS
_NAME, _KIND, _STATUS, _MESSAGE, _DURATION, _SERVICE, _SCOPE = range(FIELD, FIELD + 7)
_INFINITY_BITS = 0x7FF0000000000000
_TEXT_FOR_KERNEL = 4096  # Python searches longer text, in linear time
_STEPS_FOR_KERNEL = 1 << 18  # of a search in the kernel, whose time is the product of both lengths
_SPAN_FOR_KERNEL = 64 * 1024  # Python reads attributes of larger spans, each only once


@lean_kernel
def _order(a: Bytes, a_off: int, a_len: int, b: Bytes, b_off: int, b_len: int) -> int:
    """-1, 0 or 1 for ``a`` less than, equal to or greater than ``b``. UTF-8 has the order of its
    code points."""
    for i in range(min(a_len, b_len)):
        x = a[a_off + i]
        y = b[b_off + i]
        if x != y:
            return -1 if x < y else 1
    if a_len == b_len:
        return 0
    return -1 if a_len < b_len else 1


@lean_kernel
def _find(text: Bytes, off: int, length: int, part: Bytes, p_off: int, p_len: int) -> bool:
    for i in range(length - p_len + 1):
        if same_bytes(text, off + i, part, p_off, p_len):
            return True
    return False


@lean_kernel
def _read_int(buf: Bytes, off: int, length: int, out: Rows) -> int:
    """YES with ``out[0]`` for an integer of up to 18 digits, NO for text that is certainly not a
    number, ASK otherwise."""
    i = 0
    if length > 0 and (buf[off] == 43 or buf[off] == 45):  # + -
        i = 1
    if i >= length:
        return NO
    first = buf[off + i]
    if first == 46:  # .5
        return ASK
    if first < 48 or first > 57:
        return NO
    value = 0
    digits = 0
    plain = True
    for k in range(i, length):
        c = buf[off + k]
        if c >= 48 and c <= 57:
            if plain and digits < 18:
                value = value * 10 + int(c - 48)
            digits += 1
        elif c == 43 or c == 45 or c == 46 or c == 69 or c == 101:  # + - . E e
            plain = False
        else:
            return NO
    if not plain or digits > 18:
        return ASK
    out[0] = -value if buf[off] == 45 else value
    return YES


@lean_kernel
def _by_order(op: int, order: int) -> bool:
    if op == EQ:
        return order == 0
    if op == NE:
        return order != 0
    if op == LT:
        return order < 0
    if op == LE:
        return order <= 0
    if op == GT:
        return order > 0
    return order >= 0


@lean_kernel
def _string_leaf(buf: Bytes, off: int, length: int, leaf: Rows, text: Bytes, scratch: Rows) -> int:
    op = leaf[L_OP]
    t_off = leaf[L_TEXT_OFF]
    t_len = leaf[L_TEXT_LEN]
    if op == TRUTHY:  # "true"
        is_true = (
            length == 4
            and buf[off] == 116
            and buf[off + 1] == 114
            and buf[off + 2] == 117
            and buf[off + 3] == 101
        )
        return YES if is_true else NO
    if op <= GE:
        if leaf[L_NUMERIC] == NUMBER:
            read = _read_int(buf, off, length, scratch)
            if read == ASK:
                return ASK
            if read == YES:
                inside = leaf[L_INT_LO] <= scratch[0] and scratch[0] <= leaf[L_INT_HI]
                return YES if inside != (op == NE) else NO
            if op > NE:  # a text is neither less nor more than a number
                return NO
        if op <= NE and length != t_len:
            return YES if op == NE else NO
        return YES if _by_order(op, _order(buf, off, length, text, t_off, t_len)) else NO
    if op == CONTAINS and length <= _TEXT_FOR_KERNEL and length * t_len <= _STEPS_FOR_KERNEL:
        return YES if _find(buf, off, length, text, t_off, t_len) else NO
    return ASK


@lean_kernel
def _number_leaf(kind: int, value: int, leaf: Rows) -> int:
    op = leaf[L_OP]
    if op == TRUTHY:
        if kind == INT:
            return YES if value != 0 else NO
        magnitude = value & INT_MAX
        return YES if magnitude != 0 and magnitude <= _INFINITY_BITS else NO  # not 0.0, -0.0, NaN
    if op > GE:
        return ASK
    if kind == DOUBLE:
        magnitude = value & INT_MAX
        if magnitude >= _INFINITY_BITS:  # NaN and infinities are not equal to anything
            return YES if op == NE else NO
        if value < 0:
            value = -magnitude
    if leaf[L_NUMERIC]:
        if kind == INT:
            inside = leaf[L_INT_LO] <= value and value <= leaf[L_INT_HI]
        else:
            inside = leaf[L_FLOAT_LO] <= value and value <= leaf[L_FLOAT_HI]
        return YES if inside != (op == NE) else NO
    return YES if op == NE else NO  # the text of a number always reads as a number


@lean_kernel
def _leaf(
    leaf: Rows,
    text: Bytes,
    buf: Bytes,
    span: Rows,
    resource: Rows,
    scope: Rows,
    out: Rows,
) -> int:
    where = leaf[L_SCOPE]
    outcomes = leaf[L_OUTCOMES]
    if where < FIELD:
        if span[MSG_LEN] > _SPAN_FOR_KERNEL:
            return ASK
        key_off = leaf[L_KEY_OFF]
        key_len = leaf[L_KEY_LEN]
        out[TYPE] = MISSING
        if where == ANY:
            find_attribute(
                buf, span[MSG_OFF], span[MSG_LEN], SPAN_ATTRIBUTES, text, key_off, key_len, out
            )
        if out[TYPE] == MISSING:
            find_resource_attribute(
                buf, resource[RESOURCE_OFF], resource[RESOURCE_LEN], text, key_off, key_len, out
            )
        kind = out[TYPE]
        value = out[VALUE]
        length = out[LENGTH]
    elif where == _KIND:
        kind_number = span[KIND] if span[KIND] >= 0 and span[KIND] < 6 else 0
        return outcomes >> kind_number & 1
    elif where == _STATUS:
        status_number = span[STATUS] if span[STATUS] >= 0 and span[STATUS] < 3 else 0
        return outcomes >> status_number & 1
    elif where == _DURATION:
        return _number_leaf(INT, max(0, span[SPAN_END] - span[START]), leaf)
    else:
        kind = STRING
        if where == _NAME:
            value = span[NAME_OFF]
            length = span[NAME_LEN]
        elif where == _MESSAGE:
            value = span[MESSAGE_OFF]
            length = span[MESSAGE_LEN]
        elif where == _SCOPE:
            value = scope[SCOPE_NAME_OFF]
            length = scope[SCOPE_NAME_LEN]
        else:
            value = resource[SERVICE_OFF]
            length = resource[SERVICE_LEN]
            if length < 0:
                kind = MISSING
    if kind == STRING:
        return _string_leaf(buf, value, length, leaf, text, out)
    if kind == INT or kind == DOUBLE:
        return _number_leaf(kind, value, leaf)
    if kind == BOOL:
        return YES if outcomes & (IF_TRUE if value else IF_FALSE) else NO
    if kind == MISSING:
        return YES if outcomes & IF_MISSING else NO
    if kind == ARRAY and leaf[L_OP] == CONTAINS:
        return ASK
    return YES if leaf[L_OP] == NE else NO


@lean_kernel
def satisfies(
    program: int,
    code: Rows,
    leaves: Rows,
    text: Bytes,
    buf: Bytes,
    span: Rows,
    resource: Rows,
    scope: Rows,
    out: Rows,
) -> int:
    """``YES``, ``NO`` or ``ASK`` for one span and the predicate whose program starts at
    ``program``. ``span``, ``resource`` and ``scope`` are rows; ``out`` is scratch, int64[4]."""
    pc = program
    result = NO
    while True:
        op = code[pc, 0]
        if op == END:
            return result
        if op == LEAF:
            result = _leaf(leaves[code[pc, 1]], text, buf, span, resource, scope, out)
            if result == ASK:
                return ASK
        elif op == NEGATE:
            result = 1 - result
        elif (op == JUMP_FALSE and result == NO) or (op == JUMP_TRUE and result == YES):
            pc = code[pc, 1]
            continue
        pc += 1


class SpanValues:
    """Reads attributes of the spans in a batch for :func:`evaluate`. The values of the last span
    are kept, because many checks may ask for them.

    ``pay`` is called before each costly step with the most CPU seconds that it may take; it may
    raise.
    """

    def __init__(
        self, batch: SpanBatch, patterns: PatternSearch | None = None, pay: Pay | None = None
    ) -> None:
        self._batch = batch
        self._patterns = patterns
        self._pay = pay
        self._row = -1
        self._values: dict[Attribute, AttributeValue] = {}

    def read(self, attribute: Attribute, row: int) -> AttributeValue:
        """See :func:`read_attribute`."""
        if row != self._row:
            self._row, self._values = row, {}
        try:
            return self._values[attribute]
        except KeyError:
            value = self._values[attribute] = read_attribute(attribute, self._batch, row)
            return value

    def search(self, attribute: Attribute, pattern: str, row: int) -> bool | None:
        """Whether the pattern is found in the attribute's text; None if the text is too long."""
        text = value_text(self.read(attribute, row))
        if text is None:
            return False
        if self._patterns is None:
            return search(pattern, text, self._pay)
        return self._patterns.search(attribute, pattern, text, self._pay)


def evaluate(predicate: Node, values: SpanValues, row: int) -> bool | None:
    """Whether the span in ``row`` satisfies ``predicate``, in plain Python; None if that depends
    on a match that is unknown because a text is too long."""
    match predicate:
        case And(items):
            return _all(evaluate(item, values, row) for item in items)
        case Or(items):
            found = _all(_opposite(evaluate(item, values, row)) for item in items)
            return _opposite(found)
        case Not(item):
            return _opposite(evaluate(item, values, row))
        case Compare(attribute, "matches", literals):
            return values.search(attribute, literals[0].text, row)
        case Compare(attribute, op, literals):
            return compare_literals(values.read(attribute, row), op, literals)
        case Truthy(attribute):
            return truthy(values.read(attribute, row))
        case _:
            raise TypeError(f"not a predicate: {predicate!r}")


def _opposite(verdict: bool | None) -> bool | None:
    return None if verdict is None else not verdict


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """The conjunction of three-valued verdicts, as lazy as possible."""
    unknown = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unknown |= verdict is None
    return None if unknown else True


def read_attribute(attribute: Attribute, batch: SpanBatch, row: int) -> AttributeValue:
    """The value of an attribute or field of the span in ``row``; None if it is missing."""
    span = batch.spans[row]
    if attribute.scope is Scope.FIELD:
        return _read_field(attribute.name, batch, span)
    key = attribute_key(attribute.name)
    out = np.zeros(OUT_SIZE, np.int64)
    if attribute.scope is Scope.ANY:
        find_attribute(
            batch.buf, span[MSG_OFF], span[MSG_LEN], SPAN_ATTRIBUTES, key, 0, len(key), out
        )
    if out[TYPE] == MISSING:
        resource = batch.resources[span[RESOURCE]]
        find_resource_attribute(
            batch.buf, resource[RESOURCE_OFF], resource[RESOURCE_LEN], key, 0, len(key), out
        )
    return attribute_value(batch, out.tolist())


def attribute_value(batch: SpanBatch, found: Sequence[int]) -> AttributeValue:
    """The value that :mod:`betrace.service.otlp.attributes` found in the bytes of a batch; None if
    it is missing."""
    kind, value, length, _ = found
    if kind == MISSING:
        return None
    if kind == STRING:
        return batch.text(value, length)
    if kind == INT:
        return value
    if kind == BOOL:
        return bool(value)
    if kind == DOUBLE:
        return cast(float, struct.unpack("<d", struct.pack("<q", value))[0])
    data = batch.buf[value : value + length].tobytes()
    if kind == BYTES:
        return data
    if kind == ARRAY:
        return [plain_value(item) for item in ArrayValue.FromString(data).values]
    return {}  # comparisons with a key-value list are false, whatever its contents


@lru_cache(maxsize=4096)
def attribute_key(name: str) -> Bytes:
    """The bytes of an attribute's name, for kernels."""
    return np.frombuffer(name.encode("utf-8", "surrogatepass"), np.uint8)


def plain_value(value: AnyValue) -> AttributeValue:
    """The value as Python values; a key-value list is an empty dict. None for no value."""
    kind = value.WhichOneof("value")
    if kind in ("string_value", "bool_value", "int_value", "double_value", "bytes_value"):
        return cast(AttributeValue, getattr(value, kind))
    if kind is None:
        return None
    if kind == "array_value":
        return [plain_value(item) for item in value.array_value.values]
    return {}  # comparisons with nested values are false


def _read_field(name: str, batch: SpanBatch, span: Rows) -> AttributeValue:
    def named(names: tuple[str, ...], number: int) -> str:
        return names[number] if 0 <= number < len(names) else names[0]

    match name:
        case "name":
            return batch.text(int(span[NAME_OFF]), int(span[NAME_LEN]))
        case "kind":
            return named(KINDS, int(span[KIND]))
        case "status":
            return named(STATUSES, int(span[STATUS]))
        case "statusMessage":
            return batch.text(int(span[MESSAGE_OFF]), int(span[MESSAGE_LEN]))
        case "duration":
            return max(0, int(span[SPAN_END]) - int(span[START]))
        case "service":
            resource = batch.resources[span[RESOURCE]]
            length = int(resource[SERVICE_LEN])
            return None if length < 0 else batch.text(int(resource[SERVICE_OFF]), length)
        case "scope":
            scope = batch.scopes[span[SCOPE]]
            return batch.text(int(scope[SCOPE_NAME_OFF]), int(scope[SCOPE_NAME_LEN]))
        case _:
            raise ValueError(f"unknown field span:{name}")
