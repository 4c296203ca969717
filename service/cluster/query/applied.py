"""How far each partition's ``OUT`` stream is stored at a query node.

A message is applied once everything in it, and in all messages before it, is stored: in the ledger
and in DuckDB, in the files that wait for them, or as a dead letter. The applied sequences are saved
in a file, and the node continues after them when it restarts. What was stored beyond them is then
stored again, which changes nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import orjson

from betrace.service.durable import sync_directory, write_atomically

FILE = "cursors.json"
_FORMAT = 1


@dataclass(slots=True)
class _Message:
    sequence: int
    unstored: int


class AppliedPositions:
    """The applied sequence of each partition. May be called from any thread."""

    def __init__(self, applied: Iterable[tuple[int, int]] = ()) -> None:
        self._lock = threading.Lock()
        self._applied: dict[int, int] = dict(applied)
        self._waiting: dict[int, deque[_Message]] = {}
        self._by_ticket: dict[int, tuple[int, _Message]] = {}
        self.generation = 0
        """Grows with every :meth:`rewind`: readers then begin again."""

    def get(self, partition: int) -> int:
        """The applied sequence of a partition, 0 before the first message."""
        return self._applied.get(partition, 0)

    def all(self) -> dict[int, int]:
        """The applied sequences by partition."""
        with self._lock:
            return dict(self._applied)

    def enter(
        self, partition: int, sequence: int, tickets: Collection[int], generation: int
    ) -> bool:
        """Note a message, in the order of sequences, and the tickets of what is in it, before any
        of it is sent to the stores. Returns False, and does nothing, after a rewind."""
        with self._lock:
            if generation != self.generation:
                return False
            message = _Message(sequence, len(tickets))
            self._waiting.setdefault(partition, deque()).append(message)
            for ticket in tickets:
                self._by_ticket[ticket] = partition, message
            self._advance(partition)
        return True

    def stored(self, ticket: int) -> None:
        """Note that the item with this ticket is stored; other tickets are ignored."""
        with self._lock:
            found = self._by_ticket.pop(ticket, None)
            if found is not None:
                partition, message = found
                message.unstored -= 1
                self._advance(partition)

    def abandon(self, tickets: Collection[int]) -> None:
        """Forget items that are not sent to the stores after all. Their message, and those after
        it, do not become applied."""
        with self._lock:
            for ticket in tickets:
                self._by_ticket.pop(ticket, None)

    def rewind(self) -> None:
        """Begin again: nothing counts as applied any more."""
        with self._lock:
            self.generation += 1
            self._applied.clear()
            self._waiting.clear()
            self._by_ticket.clear()

    def _advance(self, partition: int) -> None:
        waiting = self._waiting.get(partition)
        while waiting and not waiting[0].unstored:
            self._applied[partition] = waiting.popleft().sequence


@dataclass(frozen=True, slots=True)
class Cursors:
    """What the file has: the applied sequences by partition, the tenants that had a DuckDB file
    then, and the id of the cluster, empty if it was not known."""

    applied: dict[int, int]
    tenants: frozenset[str]
    cluster: str = ""


def read_cursors(path: Path) -> Cursors:
    """The saved cursors; none if the file is missing or damaged, because everything can be applied
    again."""
    try:
        value = orjson.loads(path.read_bytes())
        if value["format"] == _FORMAT:
            applied = {int(partition): int(upto) for partition, upto in value["applied"].items()}
            return Cursors(applied, frozenset(value["tenants"]), value.get("cluster", ""))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return Cursors({}, frozenset())


def remove_cursors(path: Path) -> None:
    """Delete the file durably. Raises :exc:`OSError`."""
    if path.exists():
        path.unlink()
        sync_directory(path.parent)


def write_cursors(path: Path, cursors: Cursors) -> None:
    """Replace the file durably. Raises :exc:`OSError`."""
    value = {
        "format": _FORMAT,
        "applied": {str(partition): upto for partition, upto in sorted(cursors.applied.items())},
        "tenants": sorted(cursors.tenants),
        "cluster": cursors.cluster,
    }
    write_atomically(path, orjson.dumps(value))
