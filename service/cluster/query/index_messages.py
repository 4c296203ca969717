"""The requests that evaluators send to the index at a query node, and its answers.

An evaluator asks when late spans arrive for traces that it no longer has in memory. Messages are
JSON, compressed with zstd. An answer has at most :data:`MOST_BYTES`, so it may cover only the first
of the traces; the evaluator then asks for the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson
import zstandard

from betrace.service.storage.duck.queries import TraceRow

MOST_BYTES = 512 << 10  # a server accepts 1 MiB in one message by default
MOST_TRACES = 256
_MOST_DECOMPRESSED = 256 << 20

Raised = tuple[str, str, int, int, str]
"""As returned by :meth:`betrace.service.storage.duck.store.DuckStore.raised_of`."""


class IndexMessageError(ValueError):
    """The bytes are not a message of this version of the program."""


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """Asks for traces (32 hex digits each, at most :data:`MOST_TRACES`) of a partition. ``upto`` is
    the ``OUT`` sequence that must be applied."""

    partition: int
    upto: int
    tenant: str
    traces: list[str]


@dataclass(frozen=True, slots=True)
class IndexAnswer:
    """What is stored about the first ``answered`` of the traces. ``applied`` is the ``OUT``
    sequence of the partition that was applied before the index was read."""

    applied: int
    answered: int = 0
    rows: dict[str, TraceRow] = field(default_factory=dict)
    raised: dict[str, list[Raised]] = field(default_factory=dict)
    problem: str | None = None
    """Why the index cannot answer now."""


def pack_request(request: IndexRequest) -> bytes:
    """The bytes of a request."""
    return _pack(asdict(request))


def unpack_request(data: bytes) -> IndexRequest:
    """The inverse of :func:`pack_request`. Raises :exc:`IndexMessageError`."""
    value = _unpack(data)
    try:
        return IndexRequest(
            int(value["partition"]),
            int(value["upto"]),
            str(value["tenant"]),
            [str(each) for each in value["traces"]][:MOST_TRACES],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise IndexMessageError(f"not a request to the index: {error!r}") from error


def pack_answer(answer: IndexAnswer, traces: list[str]) -> bytes:
    """The bytes of an answer about ``traces``, cut to as many of them as fit. The positions of a
    trace that does not fit alone are left out, and it is marked as partial."""
    while True:
        data = _pack(asdict(answer))
        if len(data) <= MOST_BYTES or not answer.answered:
            return data
        if answer.answered == 1:
            rows = {k: replace(row, positions=[], partial=True) for k, row in answer.rows.items()}
            return _pack(asdict(replace(answer, rows=rows)))
        number = answer.answered // 2
        kept = set(traces[:number])
        answer = replace(
            answer,
            answered=number,
            rows={k: row for k, row in answer.rows.items() if k in kept},
            raised={k: found for k, found in answer.raised.items() if k in kept},
        )


def unpack_answer(data: bytes) -> IndexAnswer:
    """The inverse of :func:`pack_answer`. Raises :exc:`IndexMessageError`."""
    value = _unpack(data)
    try:
        return IndexAnswer(
            value["applied"],
            value["answered"],
            {trace_id: TraceRow(**row) for trace_id, row in value["rows"].items()},
            {k: [tuple(each) for each in found] for k, found in value["raised"].items()},
            value["problem"],
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise IndexMessageError(f"not an answer of the index: {error!r}") from error


def _pack(value: dict[str, Any]) -> bytes:
    return zstandard.compress(orjson.dumps(value), 1)


def _unpack(data: bytes) -> dict[str, Any]:
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=_MOST_DECOMPRESSED)
        value = orjson.loads(raw)
    except (zstandard.ZstdError, ValueError) as error:
        raise IndexMessageError(f"the message cannot be decoded: {error}") from error
    if not isinstance(value, dict):
        raise IndexMessageError("the message is not a JSON object")
    return value
