"""Which keys a table has, in memory: a row whose key is not among them is new without a look.

A key is the exclusive or of the two halves of an id of 16 bytes; of both, since some tracers leave
one half zero, or put a time there. Two ids may share a key, so a key that is there calls for a look
at the rows that have it; one that is not there needs none.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

KeyArray = npt.NDArray[np.uint64]

_GROWTH = 4  # between the lengths of two runs
_BYTES = 8  # a key


class KeyBudget:
    """The memory that the keys of all tables share, ``most_bytes``. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used

    def take(self, count: int) -> bool:
        """Take room for ``count`` keys; False, and nothing taken, where there is not so much."""
        with self._lock:
            if self._used + count * _BYTES > self._most:
                return False
            self._used += count * _BYTES
            return True

    def give(self, count: int) -> None:
        """Give the room of ``count`` keys back."""
        with self._lock:
            self._used -= count * _BYTES


class Keys:
    """A set of keys that only grows, in sorted runs of geometric lengths as in a log-structured
    merge tree (O'Neil, Cheng, Gawlick and O'Neil, 1996). Not thread-safe.

    Where ``budget`` has no room, the set gives up and takes every key for one that may be there:
    its table is then asked each time, which is slower and as right.
    """

    def __init__(self, budget: KeyBudget) -> None:
        self._budget = budget
        self._runs: list[KeyArray] | None = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def complete(self) -> bool:
        """False where there was no room, and nothing is known."""
        return self._runs is not None

    def maybe(self, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """For each key whether it may be there."""
        if self._runs is None:
            return np.ones(len(keys), np.bool_)
        found = np.zeros(len(keys), np.bool_)
        for run in self._runs:
            at = np.searchsorted(run, keys)
            at[at == len(run)] = 0
            found |= run[at] == keys
        return found

    def add(self, keys: KeyArray) -> None:
        """Add keys; those that are there already may be counted twice."""
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
            # Timsort, which finds the two runs and merges them.
            runs[-1] = np.sort(np.concatenate([runs[-1], last]), kind="stable")

    def clear(self) -> None:
        """Forget all, and give the room back."""
        self._budget.give(self._count)
        self._count = 0
        if self._runs is not None:
            self._runs = []


def id_key(key: bytes) -> int:
    """The key of an id of 16 bytes."""
    return int.from_bytes(key[:8], "big") ^ int.from_bytes(key[8:], "big")


def id_keys(ids: list[bytes]) -> KeyArray:
    """The keys of ids of 16 bytes."""
    halves = np.frombuffer(b"".join(ids), ">u8").astype(np.uint64)
    return halves[::2] ^ halves[1::2]


def frame_keys(keys: KeyArray, first: npt.NDArray[np.int64]) -> KeyArray:
    """The keys of chunks of log positions: of their traces' keys and their first positions."""
    return keys ^ (first.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
