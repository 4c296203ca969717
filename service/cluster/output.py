"""The messages of ``OUT_p``: what a partition decided, and how far it has come.

A message is a zstd frame with a checksum. It contains the header's length, the header (JSON), and
the columns of closed traces (:mod:`betrace.service.cluster.output_columns`).

An :class:`Output` that is too large for one message is split. All parts but the last say that they
are not complete.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import zstandard

from betrace.service.cluster.output_columns import (
    BYTES_OF_TRACE,
    ArrayReader,
    describe,
    read_decided,
)
from betrace.service.signals import Signal
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.traces.due import DueTraces
from betrace.service.traces.verdicts import Decided

MOST_BYTES = 512 << 10
"""Of a message, before compression. A NATS server accepts 1 MiB unless it is configured."""
MOST_DECOMPRESSED = 256 << 20

_FORMAT = 1
_HEAD = struct.Struct("<I")  # length of the header
_LEVEL = 1


class OutputCorrupt(ValueError):  # noqa: N818
    """The bytes are not a message of ``OUT_p`` of this version of the program."""


@dataclass(slots=True)
class Counts:
    """What became of the messages of ``SPANS_p`` up to a sequence, since its first one.

    ``evaluated + dead_lettered`` is the number of messages applied.
    """

    evaluated: int = 0
    """Messages."""
    dead_lettered: int = 0
    """Messages that could not be read or folded, at least in part. They stay in ``SPANS_p``."""
    frames: int = 0
    dead_frames: int = 0
    spans: int = 0
    ticks: int = 0
    markers: int = 0
    bad_rules: int = 0
    """Rules in markers that could not be compiled."""
    recalled: int = 0
    """Traces read back from the log because late spans arrived."""
    deleted_spans: int = 0
    """Spans that were not evaluated because their tenant was deleted."""


@dataclass(frozen=True, slots=True)
class DeadMessage:
    """A message that could not be applied, or a tenant's frame or rules in it (empty: all)."""

    sequence: int
    tenant: str
    reason: str


@dataclass(frozen=True, slots=True)
class NotJudged:
    """A trace of a tenant that a rule could not judge."""

    tenant: str
    trace: UndecidedTrace


@dataclass(slots=True)
class Output:
    """What a partition decided since the previous output.

    ``upto`` is the last sequence of ``SPANS_p`` that is applied, ``step`` the number of the last
    step (:mod:`betrace.service.cluster.evaluator.state`), ``time_ns`` the server's time of that
    message. ``complete`` is false for all but the last part of an output that was split.
    """

    upto: int
    step: int
    log_time_ns: int
    time_ns: int
    counts: Counts
    decided: list[Decided] = field(default_factory=list)
    dead: list[DeadMessage] = field(default_factory=list)
    undecided: list[NotJudged] = field(default_factory=list)
    complete: bool = True

    @property
    def rows(self) -> int:
        """Signals and traces."""
        return sum(each.weight for each in self.decided)

    def add(self, later: Output) -> None:
        """Take in the next output of the same partition."""
        self.upto, self.step = later.upto, later.step
        self.log_time_ns, self.time_ns = later.log_time_ns, later.time_ns
        self.counts = later.counts
        self.decided += later.decided
        self.dead += later.dead
        self.undecided += later.undecided


def pack(output: Output, most_bytes: int = MOST_BYTES) -> list[bytes]:
    """The messages of an output, in order; at least one."""
    whole = replace(output, decided=_merged(output.decided))
    parts = _split(whole, most_bytes)
    for part in parts[:-1]:
        part.complete = False
    return [_pack(part) for part in parts]


def unpack(data: bytes) -> Output:
    """The output in a message. Raises :exc:`OutputCorrupt`."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MOST_DECOMPRESSED)
        (length,) = _HEAD.unpack_from(raw)
        header = orjson.loads(raw[_HEAD.size : _HEAD.size + length])
        if header["format"] != _FORMAT:
            raise OutputCorrupt(f"the output has format {header['format']}, expected {_FORMAT}")
        return _read(header, ArrayReader(raw, _HEAD.size + length))
    except OutputCorrupt:
        raise
    except (
        zstandard.ZstdError,
        struct.error,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise OutputCorrupt(f"damaged output: {error}") from error


def _merged(decided: Sequence[Decided]) -> list[Decided]:
    """The same with fewer items: one for each tenant, and more only where its rules or services
    change. The order of a tenant's signals stays."""
    groups: list[list[Decided]] = []
    latest: dict[str, tuple[list[Decided], tuple[str, int] | None]] = {}
    for each in decided:
        closed = each.closed
        own = None if closed is None else (closed.rules.version, id(closed.services))
        group, key = latest.get(each.tenant, (None, None))
        if group is None or (own is not None and key is not None and own != key):
            group, key = [], None
            groups.append(group)
        group.append(each)
        latest[each.tenant] = group, own or key
    return [_joined(group) for group in groups]


def _joined(group: list[Decided]) -> Decided:
    if len(group) == 1:
        return group[0]
    closed = [each.closed for each in group if each.closed is not None]
    spilled = [each.spilled for each in group if each.spilled is not None]
    together = closed[0] if closed else None
    if together is not None:
        together = replace(
            together,
            rows=np.concatenate([each.rows for each in closed]),
            names=np.concatenate([each.names for each in closed]),
        )
    return Decided(
        group[0].tenant,
        [signal for each in group for signal in each.signals],
        together,
        np.concatenate(spilled) if spilled else None,
        max(each.due_ns for each in group),
    )


def _split(output: Output, most_bytes: int) -> list[Output]:
    if _size(output) <= most_bytes:
        return [output]
    if len(output.decided) > 1:
        middle = len(output.decided) // 2
        halves = output.decided[:middle], output.decided[middle:]
    elif output.rows > 1:
        first, second = _halves(output.decided[0])
        halves = [first], [second]
    else:
        return [output]
    before = replace(output, decided=halves[0], dead=[], undecided=[])
    after = replace(output, decided=halves[1])
    return [*_split(before, most_bytes), *_split(after, most_bytes)]


def _halves(decided: Decided) -> tuple[Decided, Decided]:
    closed, signals = decided.closed, decided.signals
    traces = 0 if closed is None else len(closed)
    n, k = len(signals) // 2, traces // 2
    if not n and not k:
        n = len(signals)
    return (
        replace(
            decided,
            signals=signals[:n],
            closed=None if closed is None or not k else _part(closed, 0, k),
            spilled=None,
        ),
        replace(
            decided,
            signals=signals[n:],
            closed=None if closed is None else _part(closed, k, traces),
        ),
    )


def _part(closed: DueTraces, first: int, last: int) -> DueTraces:
    return replace(closed, rows=closed.rows[first:last], names=closed.names[first:last])


def _size(output: Output) -> int:
    """About the bytes of a message, before compression."""
    total = 0
    for each in output.decided:
        total += sum(_signal_size(signal) for signal in each.signals)
        total += 0 if each.closed is None else len(each.closed) * BYTES_OF_TRACE
        total += 0 if each.spilled is None else each.spilled.nbytes
    return total + 200 * (len(output.dead) + len(output.undecided))


def _signal_size(signal: Signal) -> int:
    spans = sum(map(len, signal.evidence.values()))
    return 600 + 2 * len(signal.message) + 40 * spans + len(str(signal.context or ""))


def _pack(output: Output) -> bytes:
    arrays: list[bytes] = []
    header = {
        "format": _FORMAT,
        "upto": output.upto,
        "step": output.step,
        "log_time_ns": output.log_time_ns,
        "time_ns": output.time_ns,
        "complete": output.complete,
        "counts": asdict(output.counts),
        "dead": [asdict(each) for each in output.dead],
        "undecided": [[each.tenant, asdict(each.trace)] for each in output.undecided],
        "decided": [describe(each, arrays) for each in output.decided],
    }
    text = orjson.dumps(header)
    raw = b"".join([_HEAD.pack(len(text)), text, *arrays])
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(raw)


def _read(header: dict[str, Any], arrays: ArrayReader) -> Output:
    return Output(
        header["upto"],
        header["step"],
        header["log_time_ns"],
        header["time_ns"],
        Counts(**header["counts"]),
        [read_decided(each, arrays) for each in header["decided"]],
        [DeadMessage(**each) for each in header["dead"]],
        [NotJudged(tenant, UndecidedTrace(**each)) for tenant, each in header["undecided"]],
        header["complete"],
    )
