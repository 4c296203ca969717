"""Cursors of lists whose rows have numbers of their own at each query node of a cluster.

Such a cursor contains a hash of the node's name, so another node refuses it instead of showing the
wrong page. In one process a cursor is the number.
"""

from __future__ import annotations

from zlib import crc32

from betrace.service.api.errors import ApiError
from betrace.service.api.sources import Sources

_BITS = 16


def make_cursor(sources: Sources, number: int | None) -> str | None:
    """The cursor for the page before a row; None for the last page."""
    if number is None or sources.node is None:
        return None if number is None else str(number)
    return str(number << _BITS | _mark(sources.node.name))


def read_cursor(sources: Sources, cursor: int | None) -> int | None:
    """The inverse of :func:`make_cursor`. Raises :exc:`ApiError` 400 for a cursor of another
    node."""
    if cursor is None or sources.node is None:
        return cursor
    if cursor & ((1 << _BITS) - 1) != _mark(sources.node.name):
        raise ApiError(
            400,
            "the cursor was made by another query node",
            "read the list again from its first page, or ask the same node for all pages",
        )
    return cursor >> _BITS


def _mark(name: str) -> int:
    return crc32(name.encode()) & ((1 << _BITS) - 1)
