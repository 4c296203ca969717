"""The keys of a table's rows, in memory: a row whose key is not among them is new, without a query.

A key is the exclusive or of the two halves of a 16-byte id; of both halves because some tracers
leave one of them zero or put a time there. Two ids may share a key, so an existing key requires a
query for the rows that have it; a missing key does not.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

KeyArray = npt.NDArray[np.uint64]

_GROWTH = 4  # ratio of the lengths of two runs
_BYTES = 8  # per key


class KeyBudget:
    """The memory shared by the keys of all tables: ``most_bytes``. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes in use."""
        return self._used

    def take(self, count: int) -> bool:
        """Take memory for ``count`` keys; if there is too little, take nothing and return False."""
        with self._lock:
            if self._used + count * _BYTES > self._most:
                return False
            self._used += count * _BYTES
            return True

    def give(self, count: int) -> None:
        """Return the memory of ``count`` keys."""
        with self._lock:
            self._used -= count * _BYTES


class Keys:
    """A set of keys that only grows, in sorted runs of geometric lengths as in a log-structured
    merge tree (O'Neil, Cheng, Gawlick and O'Neil, 1996). Not thread-safe.

    If ``budget`` is exhausted, the set gives up and reports every key as one that may exist. The
    table is then queried each time, which is slower but still correct.
    """

    def __init__(self, budget: KeyBudget) -> None:
        self._budget = budget
        self._runs: list[KeyArray] | None = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def complete(self) -> bool:
        """False if memory ran out, so that nothing is known."""
        return self._runs is not None

    def maybe(self, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """For each key, whether it may exist."""
        if self._runs is None:
            return np.ones(len(keys), np.bool_)
        found = np.zeros(len(keys), np.bool_)
        for run in self._runs:
            at = np.searchsorted(run, keys)
            at[at == len(run)] = 0
            found |= run[at] == keys
        return found

    def add(self, keys: KeyArray) -> None:
        """Add keys; existing ones may be counted twice."""
        if self._runs is None or not len(keys):
            return
        if not self._budget.take(len(keys)):
            self.clear()
            self._runs = None
            return
        self._count += len(keys)
        runs = self._runs
        runs.append(np.sort(keys))
        while len(runs) > 1 and len(runs[-2]) < _GROWTH * len(runs[-1]):
            last = runs.pop()
            # Stable means timsort, which finds the two runs and merges them.
            runs[-1] = np.sort(np.concatenate([runs[-1], last]), kind="stable")

    def clear(self) -> None:
        """Remove all keys and return their memory."""
        self._budget.give(self._count)
        self._count = 0
        if self._runs is not None:
            self._runs = []


def id_key(key: bytes) -> int:
    """The key of a 16-byte id."""
    return int.from_bytes(key[:8], "big") ^ int.from_bytes(key[8:], "big")


def id_keys(ids: list[bytes]) -> KeyArray:
    """The keys of 16-byte ids."""
    halves = np.frombuffer(b"".join(ids), ">u8").astype(np.uint64)
    return halves[::2] ^ halves[1::2]


def frame_keys(keys: KeyArray, first: npt.NDArray[np.int64]) -> KeyArray:
    """The keys of chunks of log positions, from their traces' keys and their first positions."""
    return keys ^ (first.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
