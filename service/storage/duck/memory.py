"""DuckDB's memory: pages of files that it keeps, and how to have it let go of them.

What a checkpoint writes stays in the buffer pool until the memory limit is reached, which takes
long under a steady load; until then memory grows. The system keeps the same pages in its cache of
files, from where they are read again in little more time.
"""

from __future__ import annotations

from contextlib import suppress

import duckdb

from betrace.service.storage.duck.schema import Cursor

_PAGES = "BASE_TABLE"


def used(cursor: Cursor) -> dict[str, int]:
    """Bytes in the buffer pool, by what they are for (DuckDB's names)."""
    return dict(cursor.execute("SELECT tag, memory_usage_bytes FROM duckdb_memory()").fetchall())


def let_go_of_pages(cursor: Cursor, most: int, limit: int) -> int:
    """Drop the pages used longest ago, but for ``most`` bytes of them; how many bytes they were.

    ``limit`` is the instance's memory limit. It is lowered for a moment, to which DuckDB answers by
    dropping pages of files, before anything that it would have to write to a temporary file. Who
    needs memory at that moment has ``most`` bytes of pages that can be dropped as well.
    """
    before = used(cursor)
    excess = before.get(_PAGES, 0) - most
    if excess <= 0:
        return 0
    try:
        with suppress(duckdb.OutOfMemoryException):  # some are in use
            cursor.execute(f"SET memory_limit = '{sum(before.values()) - excess}B'")
    finally:
        cursor.execute(f"SET memory_limit = '{limit}B'")
    return excess
