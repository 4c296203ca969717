"""The state of a partition: a function of the prefix of its log ``SPANS_p``.

Work is done in *steps*, which are numbered: folding a group of messages, and closing the traces
that are due at a boundary of log time. Where groups end depends on the log alone, so a successor
that starts from any snapshot decides the same, in the same steps.

Messages of a group that has not ended yet are *received* but not *applied*. A tick ends a group: an
owner that wants results soon appends one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from betrace.service.cluster.output import Output
from betrace.service.traces.due import DueTraces


class Message(Protocol):
    """A message of ``SPANS_p`` (``LogMessage`` of the storage)."""

    sequence: int
    time_ns: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Anchor:
    """The message up to which a snapshot goes: a log that lost its tail has another one there."""

    sequence: int
    time_ns: int
    digest: str
    """:func:`digest_of` its data."""


class PartitionState:
    """Not thread-safe: one call at a time, in a worker thread.

    Order of calls: :meth:`restore` if there is a snapshot; :meth:`note` for each message of
    ``OUT_p`` after the snapshot's ``out_sequence``; then :meth:`apply` with the messages after
    :attr:`received`, as they come; :meth:`stored` whenever an output is stored in ``OUT_p``.
    """

    applied: int
    """The last sequence that is part of the state."""
    received: int
    """The last sequence given to :meth:`apply`; the next call continues after it."""
    step: int
    """The number of the last step."""
    log_time_ns: int
    rules_revisions: dict[str, int]
    """By tenant, the revision of the rules in force."""
    waiting: str | None
    """Why the last call of :meth:`apply` stopped before the end (the index or the log cannot be
    read now). Call it again a little later, also without messages; until then there is no
    snapshot."""

    def apply(self, messages: Sequence[Message]) -> Output | None:
        """Apply the next messages. Returns what was decided, None if no step was completed."""
        raise NotImplementedError

    def note(self, output: Output) -> None:
        """Note what ``OUT_p`` has beyond the snapshot, in order, before anything is applied."""
        raise NotImplementedError

    def stored(self, step: int) -> None:
        """Note that the outputs up to a step are stored in ``OUT_p``."""
        raise NotImplementedError

    def snapshot(self, out_sequence: int) -> bytes:
        """The state up to :attr:`applied` and :attr:`step`. It may be used (published) only once
        all outputs up to this step are stored. ``out_sequence`` is the last message of ``OUT_p``
        known to be stored now; a successor notes those after it. Raises
        :exc:`betrace.service.pipeline.open_traces.NotNow` while :attr:`waiting`."""
        raise NotImplementedError

    def restore(self, data: bytes) -> tuple[Anchor, int]:
        """Continue from a snapshot. Returns its anchor, and its ``out_sequence``. Raises ValueError
        if it cannot be used."""
        raise NotImplementedError

    def look_up(self, tenant: str, trace_id: str) -> DueTraces | None:
        """A copy of a trace in memory, for people."""
        raise NotImplementedError


def digest_of(data: bytes) -> str:
    """The digest of a message in an :class:`Anchor`."""
    return hashlib.sha256(data).hexdigest()[:32]
