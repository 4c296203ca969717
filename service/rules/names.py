"""The checks of each span name: a hash table for the fold kernel.

Exact names are in it from the start. If rules have patterns (``db.*``), each other name is matched
against all patterns once, and the result is stored. The table has a fixed capacity; when it is
full, all learned names are dropped. Names are compared byte by byte, so hash collisions are
harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from betrace.service.jit import lean_kernel
from betrace.service.otlp.columns import Bytes, Rows
from betrace.service.otlp.primitives import same_bytes

N_HASH, N_OFF, N_LEN, N_FIRST, N_COUNT = range(5)  # columns of a slot; N_LEN -1: empty
G_OFF, G_LEN, G_CHECK = range(3)  # columns of a pattern
USED, ARENA_USED, LISTS_USED = range(3)  # entries of fill

NO_CHECKS, FULL, TOO_LONG = -1, -2, -3  # instead of a slot
LONGEST_NAME = 4096  # longer names are matched against patterns outside the kernel

_LEARNED_SLOTS, _LEARNED_BYTES, _LEARNED_CHECKS = 4096, 1 << 19, 1 << 16


class NameArrays(NamedTuple):
    """The table's arrays. ``lists[first:first + count]`` are the check numbers of a slot,
    ascending."""

    slots: Rows
    arena: Bytes
    lists: Rows
    fill: Rows
    globs: Rows
    patterns: Bytes


class NameTable:
    """Maps names and patterns to checks; see the module's description."""

    def __init__(self, names: Iterable[tuple[str, int]], hash_text: Callable[[str], int]) -> None:
        exact: dict[str, list[int]] = {}
        globs: list[tuple[str, int]] = []
        for name, check in names:
            if "*" in name:
                globs.append((name, check))
            else:
                exact.setdefault(name, []).append(check)
        self._globs = globs
        entries = [
            (hash_text(name), name.encode(), sorted([*own, *self.glob_checks(name.encode())]))
            for name, own in exact.items()
        ]
        slots = 16
        while slots < 2 * (len(entries) + (_LEARNED_SLOTS if globs else 0)):
            slots *= 2
        n_bytes = sum(len(name) for _, name, _ in entries)
        n_checks = sum(len(checks) for _, _, checks in entries)
        patterns = b"".join(pattern.encode() for pattern, _ in globs) or b"\0"
        rows, offset = [], 0
        for pattern, check in globs:
            rows.append((offset, len(pattern.encode()), check))
            offset += len(pattern.encode())
        self.arrays = NameArrays(
            slots=np.zeros((slots, 5), np.int64),
            arena=np.zeros(n_bytes + (_LEARNED_BYTES if globs else 1), np.uint8),
            lists=np.zeros(n_checks + max(_LEARNED_CHECKS, len(globs)) * bool(globs), np.int64),
            fill=np.zeros(3, np.int64),
            globs=np.array(rows, np.int64).reshape(-1, 3),
            patterns=np.frombuffer(patterns, np.uint8),
        )
        self.arrays.slots[:, N_LEN] = -1
        for name_hash, encoded, checks in entries:
            self._insert(name_hash, encoded, checks)
        self._pristine = (self.arrays.slots.copy(), self.arrays.fill.copy())

    def forget(self) -> None:
        """Drop all learned names."""
        self.arrays.slots[:], self.arrays.fill[:] = self._pristine

    def glob_checks(self, name: bytes) -> list[int]:
        """The checks whose patterns match ``name``, in time linear in the name."""
        return [check for pattern, check in self._globs if _matches(pattern.encode(), name)]

    def _insert(self, name_hash: int, name: bytes, checks: list[int]) -> None:
        slots, arena, lists, fill, _, _ = self.arrays
        i = name_hash & (len(slots) - 1)
        while slots[i, N_LEN] >= 0:
            i = (i + 1) & (len(slots) - 1)
        off, first = int(fill[ARENA_USED]), int(fill[LISTS_USED])
        slots[i] = (name_hash, off, len(name), first, len(checks))
        arena[off : off + len(name)] = np.frombuffer(name, np.uint8)
        lists[first : first + len(checks)] = checks
        fill += (1, len(name), len(checks))


def name_matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches all of a span name."""
    return _matches(pattern.encode(), name.encode())


def _matches(pattern: bytes, name: bytes) -> bool:
    """Whether ``pattern`` matches all of ``name``; ``*`` stands for any bytes."""
    head, *middle, tail = pattern.split(b"*")
    if len(name) < len(head) + len(tail) or not name.startswith(head) or not name.endswith(tail):
        return False
    at, end = len(head), len(name) - len(tail)
    for part in middle:
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


@lean_kernel
def glob_match(pattern: Bytes, p_off: int, p_len: int, name: Bytes, off: int, length: int) -> bool:
    """Whether the pattern matches all of the name; ``*`` (42) stands for any bytes.

    The usual greedy matching, which backtracks only to the last star: that star may have to match
    more, but earlier stars never have to be tried again.
    """
    p = n = 0
    star = -1
    resume = 0
    while n < length:
        if p < p_len and pattern[p_off + p] == 42:
            star = p
            resume = n
            p += 1
        elif p < p_len and pattern[p_off + p] == name[off + n]:
            p += 1
            n += 1
        elif star >= 0:
            p = star + 1
            resume += 1
            n = resume
        else:
            return False
    while p < p_len and pattern[p_off + p] == 42:
        p += 1
    return p == p_len


@lean_kernel
def find_name(names: NameArrays, name_hash: int, buf: Bytes, off: int, length: int) -> int:
    """The slot of a span name; if there are patterns, an unknown name is learned first.

    Returns ``NO_CHECKS`` if no check has the name, ``FULL`` if it cannot be learned before
    :meth:`NameTable.forget`, and ``TOO_LONG`` if the caller must try the patterns.
    """
    slots = names.slots
    mask = len(slots) - 1
    i = name_hash & mask
    while slots[i, N_LEN] >= 0:
        if (
            slots[i, N_HASH] == name_hash
            and slots[i, N_LEN] == length
            and same_bytes(names.arena, slots[i, N_OFF], buf, off, length)
        ):
            return i
        i = (i + 1) & mask
    n_globs = len(names.globs)
    if n_globs == 0:
        return NO_CHECKS
    if length > LONGEST_NAME:
        return TOO_LONG
    fill = names.fill
    if (
        2 * (fill[USED] + 1) > len(slots)
        or fill[ARENA_USED] + length > len(names.arena)
        or fill[LISTS_USED] + n_globs > len(names.lists)
    ):
        return FULL
    first = fill[LISTS_USED]
    count = 0
    for g in range(n_globs):
        if glob_match(
            names.patterns, names.globs[g, G_OFF], names.globs[g, G_LEN], buf, off, length
        ):
            names.lists[first + count] = names.globs[g, G_CHECK]
            count += 1
    slots[i, N_HASH] = name_hash
    slots[i, N_OFF] = fill[ARENA_USED]
    slots[i, N_LEN] = length
    slots[i, N_FIRST] = first
    slots[i, N_COUNT] = count
    for k in range(length):
        names.arena[fill[ARENA_USED] + k] = buf[off + k]
    fill[USED] += 1
    fill[ARENA_USED] += length
    fill[LISTS_USED] += count
    return i
