"""Kernels for the spans of many traces at once; see :mod:`betrace.service.rules.columns`.

Spans are in order of trace, start and id. ``parents`` has the number of each span's parent, -1
without one; ``chosen`` says which spans are in a set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from betrace.service.jit import lean_kernel
from betrace.service.otlp.attributes import (
    MISSING,
    SPAN_ATTRIBUTES,
    TYPE,
    find_attribute,
    find_resource_attribute,
    skip,
)
from betrace.service.otlp.columns import (
    MSG_LEN,
    MSG_OFF,
    RESOURCE,
    RESOURCE_LEN,
    RESOURCE_OFF,
    SCOPE,
    Bytes,
    Rows,
)
from betrace.service.otlp.primitives import read_tag
from betrace.service.rules.match import satisfies

Flags = npt.NDArray[np.bool_]


@lean_kernel
def satisfying(
    program: int,
    code: Rows,
    leaves: Rows,
    text: Bytes,
    buf: Bytes,
    spans: Rows,
    resources: Rows,
    scopes: Rows,
    rows: Rows,
    scratch: Rows,
    out: Rows,
) -> None:
    """``out[i]`` is ``YES``, ``NO`` or ``ASK`` for the span in ``rows[i]`` and a program."""
    for i in range(len(rows)):
        span = spans[rows[i]]
        out[i] = satisfies(
            program,
            code,
            leaves,
            text,
            buf,
            span,
            resources[span[RESOURCE]],
            scopes[span[SCOPE]],
            scratch,
        )


@lean_kernel
def find_attributes(
    buf: Bytes, spans: Rows, resources: Rows, rows: Rows, of_span: bool, key: Bytes, out: Rows
) -> None:
    """``out[i]`` is the attribute of the span in ``rows[i]`` or, if it is missing there or with
    ``of_span`` false, of its resource."""
    for i in range(len(rows)):
        span = spans[rows[i]]
        found = out[i]
        found[TYPE] = MISSING
        if of_span:
            find_attribute(
                buf, span[MSG_OFF], span[MSG_LEN], SPAN_ATTRIBUTES, key, 0, len(key), found
            )
        if found[TYPE] == MISSING:
            resource = resources[span[RESOURCE]]
            find_resource_attribute(
                buf, resource[RESOURCE_OFF], resource[RESOURCE_LEN], key, 0, len(key), found
            )


@lean_kernel
def count_fields(buf: Bytes, spans: Rows, rows: Rows, wanted: int, out: Rows) -> None:
    """``out[i]`` is how often the tag ``wanted`` occurs in the span in ``rows[i]``."""
    for i in range(len(rows)):
        pos = spans[rows[i], MSG_OFF]
        end = pos + spans[rows[i], MSG_LEN]
        out[i] = 0
        while pos < end:
            tag, pos = read_tag(buf, pos, end)
            if pos < 0:
                break
            out[i] += tag == wanted
            pos = skip(buf, pos, end, tag)
            if pos < 0:
                break


@lean_kernel
def leaves_first(parents: Rows, waiting: Rows, order: Rows) -> int:
    """Fill ``order`` with the spans, children before their parents, without those that are their
    own ancestors; returns their number. ``waiting`` is scratch."""
    for i in range(len(parents)):
        waiting[i] = 0
    for i in range(len(parents)):
        if parents[i] >= 0:
            waiting[parents[i]] += 1
    filled = 0
    for i in range(len(parents)):
        if waiting[i] == 0:
            order[filled] = i
            filled += 1
    at = 0
    while at < filled:
        parent = parents[order[at]]
        at += 1
        if parent >= 0:
            waiting[parent] -= 1
            if waiting[parent] == 0:
                order[filled] = parent
                filled += 1
    return filled


@lean_kernel
def count_descendants(parents: Rows, order: Rows, chosen: Flags, out: Rows) -> None:
    """How many descendants of each span are chosen; ``out`` is zero, ``order`` from
    :func:`leaves_first`."""
    for k in range(len(order)):
        i = order[k]
        if parents[i] >= 0:
            out[parents[i]] += out[i] + chosen[i]


@lean_kernel
def find_ancestors(parents: Rows, order: Rows, chosen: Flags, out: Rows) -> None:
    """1 for each span with an ancestor that is chosen; ``out`` is zero, ``order`` from
    :func:`leaves_first`."""
    for k in range(len(order) - 1, -1, -1):
        parent = parents[order[k]]
        if parent >= 0 and (chosen[parent] or out[parent]):
            out[order[k]] = 1


@lean_kernel
def next_starts(of: Rows, starts: Rows, chosen: Flags, out: Rows) -> None:
    """The earliest start of a chosen span of the same trace (``of``) that starts later than each
    span, -1 without one."""
    i = len(of) - 1
    best = -1
    while i >= 0:
        if i == len(of) - 1 or of[i] != of[i + 1]:
            best = -1
        found = False
        j = i
        while j >= 0 and of[j] == of[i] and starts[j] == starts[i]:
            out[j] = best
            found = found or chosen[j]
            j -= 1
        if found:
            best = starts[i]
        i = j


@lean_kernel
def previous_starts(of: Rows, starts: Rows, chosen: Flags, out: Rows) -> None:
    """The latest start of a chosen span of the same trace (``of``) that starts earlier than each
    span, -1 without one."""
    i = 0
    best = -1
    while i < len(of):
        if i == 0 or of[i] != of[i - 1]:
            best = -1
        found = False
        j = i
        while j < len(of) and of[j] == of[i] and starts[j] == starts[i]:
            out[j] = best
            found = found or chosen[j]
            j += 1
        if found:
            best = starts[i]
        i = j
