"""The messages of a trace request, as a table in which kernels look up fields.

Source: opentelemetry-proto 1.x, ``opentelemetry.proto.collector.trace.v1`` and its imports. The
table contains only fields that need more than their wire type: messages, texts (whose UTF-8 is
checked) and fields stored in a column. A tag whose wire type differs from the field's is not found
and is an unknown field, as in the protobuf library.
"""

from __future__ import annotations

import numpy as np

from betrace.service.otlp.columns import Rows
from betrace.service.otlp.primitives import BYTES_TYPE, FIXED64, VARINT

# Message types.
(
    REQUEST_TYPE,
    RESOURCE_SPANS_TYPE,
    RESOURCE_TYPE,
    SCOPE_SPANS_TYPE,
    SCOPE_TYPE,
    SPAN_TYPE,
    EVENT_TYPE,
    LINK_TYPE,
    STATUS_TYPE,
    KEY_VALUE_TYPE,
    ANY_VALUE_TYPE,
    ARRAY_VALUE_TYPE,
    KVLIST_VALUE_TYPE,
    ENTITY_REF_TYPE,
    GROUP_TYPE,  # an unknown group: no known fields
) = range(15)

# Meanings of fields; a field without special rules is treated like an unknown one.
(
    PLAIN_FIELD,
    TRACE_ID_FIELD,
    SPAN_ID_FIELD,
    PARENT_ID_FIELD,
    KIND_FIELD,
    START_FIELD,
    END_FIELD,
    CODE_FIELD,
    TEXT_FIELD,  # a string; the ones below are strings too
    NAME_FIELD,
    MESSAGE_FIELD,
    SCOPE_NAME_FIELD,
    KEY_FIELD,
    SUBMESSAGE,  # SUBMESSAGE + type: a nested message of that type
) = range(14)

TAGS = 128  # tags below this are looked up; all fields of interest are below it


def _operations() -> Rows:
    """Return the table: the meaning of tag ``t`` in message type ``m`` is at ``m * TAGS + t``."""
    table = np.zeros((GROUP_TYPE + 1) * TAGS, np.int64)

    def put(message: int, wire_type: int, fields: dict[int, int]) -> None:
        for number, meaning in fields.items():
            table[message * TAGS + (number << 3 | wire_type)] = meaning

    put(REQUEST_TYPE, BYTES_TYPE, {1: SUBMESSAGE + RESOURCE_SPANS_TYPE})
    put(
        RESOURCE_SPANS_TYPE,
        BYTES_TYPE,
        {1: SUBMESSAGE + RESOURCE_TYPE, 2: SUBMESSAGE + SCOPE_SPANS_TYPE, 3: TEXT_FIELD},
    )
    put(
        RESOURCE_TYPE, BYTES_TYPE, {1: SUBMESSAGE + KEY_VALUE_TYPE, 3: SUBMESSAGE + ENTITY_REF_TYPE}
    )
    put(ENTITY_REF_TYPE, BYTES_TYPE, {1: TEXT_FIELD, 2: TEXT_FIELD, 3: TEXT_FIELD, 4: TEXT_FIELD})
    put(
        SCOPE_SPANS_TYPE,
        BYTES_TYPE,
        {1: SUBMESSAGE + SCOPE_TYPE, 2: SUBMESSAGE + SPAN_TYPE, 3: TEXT_FIELD},
    )
    put(
        SCOPE_TYPE, BYTES_TYPE, {1: SCOPE_NAME_FIELD, 2: TEXT_FIELD, 3: SUBMESSAGE + KEY_VALUE_TYPE}
    )
    put(
        SPAN_TYPE,
        BYTES_TYPE,
        {
            1: TRACE_ID_FIELD,
            2: SPAN_ID_FIELD,
            3: TEXT_FIELD,
            4: PARENT_ID_FIELD,
            5: NAME_FIELD,
            9: SUBMESSAGE + KEY_VALUE_TYPE,
            11: SUBMESSAGE + EVENT_TYPE,
            13: SUBMESSAGE + LINK_TYPE,
            15: SUBMESSAGE + STATUS_TYPE,
        },
    )
    put(SPAN_TYPE, VARINT, {6: KIND_FIELD})
    put(SPAN_TYPE, FIXED64, {7: START_FIELD, 8: END_FIELD})
    put(EVENT_TYPE, BYTES_TYPE, {2: TEXT_FIELD, 3: SUBMESSAGE + KEY_VALUE_TYPE})
    put(LINK_TYPE, BYTES_TYPE, {3: TEXT_FIELD, 4: SUBMESSAGE + KEY_VALUE_TYPE})
    put(STATUS_TYPE, BYTES_TYPE, {2: MESSAGE_FIELD})
    put(STATUS_TYPE, VARINT, {3: CODE_FIELD})
    put(KEY_VALUE_TYPE, BYTES_TYPE, {1: KEY_FIELD, 2: SUBMESSAGE + ANY_VALUE_TYPE})
    put(
        ANY_VALUE_TYPE,
        BYTES_TYPE,
        {1: TEXT_FIELD, 5: SUBMESSAGE + ARRAY_VALUE_TYPE, 6: SUBMESSAGE + KVLIST_VALUE_TYPE},
    )
    put(ARRAY_VALUE_TYPE, BYTES_TYPE, {1: SUBMESSAGE + ANY_VALUE_TYPE})
    put(KVLIST_VALUE_TYPE, BYTES_TYPE, {1: SUBMESSAGE + KEY_VALUE_TYPE})
    return table


OPERATIONS = _operations()
