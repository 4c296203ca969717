"""Dead letters as bytes, from which an item can be restored for its stage.

A batch of spans is stored as its positions in the span log; due and decided traces are stored
whole. All functions block, so they run in worker threads.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from betrace.service.otlp.columns import SpanBatch
from betrace.service.rules.compile import CompiledRules
from betrace.service.signals import Signal
from betrace.service.storage.partition_log import PartitionLog
from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.traces.due import DueTraces
from betrace.service.traces.serialize import SerialError, from_bytes, to_bytes
from betrace.service.traces.verdicts import Decided

FRAMES, DUE, DECIDED = "frames", "due", "decided"

Item = SpanBatch | DueTraces | Decided
RulesAt = Callable[[str, int], CompiledRules | None]
"""The rules of the frame of a tenant at a position of the span log."""


class LetterError(Exception):
    """The item of a letter cannot be restored; the message says why."""


def weigh(item: Item) -> int:
    """The weight of an item in its channel: spans, traces or rows."""
    return item.weight if isinstance(item, Decided) else len(item) or 1


def frame_positions(batch: SpanBatch) -> list[int]:
    """The span-log positions of a batch."""
    return [int(position) for position in batch.positions if position > 0]


def encode(item: Item) -> tuple[str, bytes]:
    """The kind of an item, and its bytes."""
    if isinstance(item, SpanBatch):
        return FRAMES, orjson.dumps({"positions": frame_positions(item)})
    if isinstance(item, DueTraces):
        return DUE, to_bytes(item)
    return DECIDED, decided_to_bytes(item)


def decided_to_bytes(item: Decided) -> bytes:
    """A decided item as a line of JSON."""
    return orjson.dumps(
        {
            "tenant": item.tenant,
            "signals": [signal.to_json() for signal in item.signals],
            "closed": None if item.closed is None else _text(to_bytes(item.closed)),
            "spilled": None if item.spilled is None else item.spilled.tolist(),
            "due_ns": item.due_ns,
        }
    )


def decode(
    tenant: str,
    kind: str,
    payload: bytes,
    log: PartitionLog,
    max_body_bytes: int,
    rules_at: RulesAt = lambda tenant, position: None,
) -> Item:
    """The item. Raises :exc:`LetterError`."""
    try:
        if kind == FRAMES:
            positions = positions_in(payload)
            batch = _read_batch(tenant, positions, log, max_body_bytes)
            batch.rules = rules_at(tenant, positions[0])
            return batch
        if kind == DUE:
            return from_bytes(payload)
        if kind == DECIDED:
            return decided_from_bytes(payload)
    except (SerialError, LookupError, TypeError, ValueError) as error:
        raise LetterError(f"the payload cannot be read: {error}") from error
    raise LetterError(
        f"the payload has the unknown kind {kind!r}; was it written by a newer version?"
    )


def positions_in(payload: bytes) -> list[int]:
    """The span-log positions in a payload of the kind :data:`FRAMES`."""
    positions: list[int] = orjson.loads(payload)["positions"]
    return positions


def describe(kind: str, payload: bytes) -> dict[str, Any]:
    """A description of a payload for operators, without restoring the item."""
    try:
        if kind == FRAMES:
            return {"positions": positions_in(payload)}
        if kind == DUE:
            return _shown(from_bytes(payload))
        value = orjson.loads(payload)
        closed = value["closed"]
        return {
            "signals": value["signals"],
            "closed": None if closed is None else _shown(from_bytes(base64.b64decode(closed))),
        }
    except (SerialError, LookupError, TypeError, ValueError) as error:
        return {"unreadable": str(error)}


def _shown(due: DueTraces) -> dict[str, Any]:
    return {
        "closed": due.closed,
        "rulesVersion": due.rules.version,
        "rules": [rule.id for rule in due.rules.rules],
        "traces": [due.trace_id(k) for k in range(len(due))],
    }


def _read_batch(
    tenant: str, positions: list[int], log: PartitionLog, max_body_bytes: int
) -> SpanBatch:
    found = log.read_many(tenant, positions)
    frames = [frame for frame in found if isinstance(frame, Frame)]
    if len(frames) < len(positions):
        lost = next(each for each in found if not isinstance(each, Frame))
        raise LetterError(
            f"{len(positions) - len(frames)} of {len(positions)} frames are no longer in the span "
            f"log ({lost})"
        )
    return read_frames(tenant, positions, frames, max_body_bytes)


def decided_from_bytes(line: bytes) -> Decided:
    """The inverse of :func:`decided_to_bytes`; the ticket is not restored. Raises LookupError,
    TypeError or ValueError for invalid lines."""
    value = orjson.loads(line)
    closed, spilled = value["closed"], value["spilled"]
    return Decided(
        value["tenant"],
        [Signal.from_json(each) for each in value["signals"]],
        None if closed is None else from_bytes(base64.b64decode(closed)),
        None if spilled is None else np.array(spilled, np.int64),
        value["due_ns"],
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
