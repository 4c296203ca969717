"""The columns of scanned spans.

A request body is scanned once into rows of ``int64`` (see :mod:`betrace.service.otlp.wire`); a span
never becomes a Python object on the hot path. Text is not copied: rows contain offsets into
``buf``, the scanned bytes. Attributes are not copied either: a row contains the offset of its span
message, and the few spans that a rule selects are searched on demand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

# Columns of a span row. Ids are big-endian integers, stored with the same 64 bits in int64. Times
# are nanoseconds since 1970, at most 2**63-1.
(
    TRACE_HI,  # first 8 bytes of the trace id
    TRACE_LO,  # last 8 bytes of the trace id
    SPAN_ID,
    PARENT_ID,  # 0 without a parent, or if its id is not 8 bytes long
    START,
    END,
    NAME_HASH,  # wire.hash_bytes of the name's UTF-8
    NAME_OFF,  # name in buf
    NAME_LEN,
    KIND,  # SpanKind, 0 to 5; other values as sent (an open enum)
    STATUS,  # StatusCode, 0 unset, 1 ok, 2 error; other values as sent
    MESSAGE_OFF,  # status message in buf; length 0 without one
    MESSAGE_LEN,
    FLAGS,  # HAS_PARENT | COMPLETE
    RESOURCE,  # row in resources
    SCOPE,  # row in scopes
    BODY,  # row in bodies: the request body of the span
    MSG_OFF,  # the span message (its fields, without tag and length) in buf
    MSG_LEN,
) = range(19)
SPAN_COLUMNS = 19

HAS_PARENT = 1  # the parent span id is neither empty nor all zeros
COMPLETE = 2  # the span has the attribute trace.complete = true (bool, or the string "true")

# Columns of a resource row, one for each ResourceSpans message with an accepted span.
(
    RESOURCE_OFF,  # the whole ResourceSpans message in buf: its field 1 (possibly repeated, then
    RESOURCE_LEN,  # merged) is the Resource, whose field 1 is the attributes
    SERVICE_OFF,  # the string value of the first service.name attribute; length -1 without one
    SERVICE_LEN,
) = range(4)
RESOURCE_COLUMNS = 4

# Columns of a scope row, one for each ScopeSpans message with an accepted span.
(SCOPE_NAME_OFF, SCOPE_NAME_LEN) = range(2)  # length 0 without a name
SCOPE_COLUMNS = 2

# Columns of a body row, one for each request body scanned.
(
    FIRST_SPAN,  # first row in spans
    SPAN_COUNT,  # accepted spans: rows FIRST_SPAN .. FIRST_SPAN + SPAN_COUNT
    REJECTED_TRACE_ID,  # rejected spans: trace id not 16 bytes, or all zeros
    REJECTED_SPAN_ID,  # rejected spans: span id not 8 bytes, or all zeros (trace id was valid)
    ERROR,  # 0, or an error code of wire.ERRORS: then spans has no rows of this body
    ERROR_OFF,  # position of the error, in bytes from the body's start
) = range(6)
BODY_COLUMNS = 6


@dataclass(slots=True, eq=False)
class SpanBatch:
    """Scanned spans of one tenant, from one or more request bodies.

    ``buf`` contains the decoded (decompressed, protobuf) bodies end to end; all offsets refer to
    it. ``positions`` are the span-log positions of the bodies' frames, by body row;
    ``received_ns`` is when the newest of them was received (wall clock, nanoseconds);
    ``replayed`` is set if they were read from the log after a restart. ``rules`` are the
    :class:`~betrace.service.rules.compile.CompiledRules` that they were appended to the log under;
    without, they are folded under those in force by then.
    """

    tenant: str
    buf: Bytes
    spans: Rows
    resources: Rows
    scopes: Rows
    bodies: Rows
    positions: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    received_ns: int = 0
    replayed: bool = False
    rules: object = None

    def __len__(self) -> int:
        return len(self.spans)

    def text(self, offset: int, length: int) -> str:
        """The UTF-8 text at ``offset`` in ``buf``."""
        return self.buf[offset : offset + length].tobytes().decode()

    def name(self, row: int) -> str:
        """The name of the span in row ``row``."""
        r = self.spans[row]
        return self.text(int(r[NAME_OFF]), int(r[NAME_LEN]))


def join(batches: Sequence[SpanBatch]) -> SpanBatch:
    """One batch of the spans of several, in their order; all are of one tenant, have positions and
    belong to the same rules.
    Folding few spans costs about as much as folding hundreds."""
    if len(batches) == 1:
        return batches[0]
    spans = np.concatenate([batch.spans for batch in batches])
    resources = np.concatenate([batch.resources for batch in batches])
    scopes = np.concatenate([batch.scopes for batch in batches])
    bodies = np.concatenate([batch.bodies for batch in batches])
    sizes = np.array([_sizes(batch) for batch in batches])
    starts = np.cumsum(sizes, axis=0) - sizes
    of_span = np.repeat(starts, sizes[:, 1], axis=0)
    for column in (NAME_OFF, MESSAGE_OFF, MSG_OFF):
        spans[:, column] += of_span[:, 0]
    spans[:, RESOURCE] += of_span[:, 2]
    spans[:, SCOPE] += of_span[:, 3]
    spans[:, BODY] += of_span[:, 4]
    resources[:, [RESOURCE_OFF, SERVICE_OFF]] += np.repeat(starts[:, :1], sizes[:, 2], axis=0)
    scopes[:, SCOPE_NAME_OFF] += np.repeat(starts[:, 0], sizes[:, 3])
    bodies[:, FIRST_SPAN] += np.repeat(starts[:, 1], sizes[:, 4])
    buf = np.concatenate([batch.buf for batch in batches])
    buf.flags.writeable = False  # as kernels expect it
    return SpanBatch(
        batches[0].tenant,
        buf,
        spans,
        resources,
        scopes,
        bodies,
        np.concatenate([batch.positions for batch in batches]),
        max(batch.received_ns for batch in batches),
        rules=batches[0].rules,
    )


def _sizes(batch: SpanBatch) -> tuple[int, int, int, int, int]:
    resources, scopes, bodies = len(batch.resources), len(batch.scopes), len(batch.bodies)
    return len(batch.buf), len(batch.spans), resources, scopes, bodies
