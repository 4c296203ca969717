"""Checkpoints: the state of all traces in a file, so that a restart reads little of the log.

A file is the magic bytes and the header's length, the header (JSON, with the type and shape of each
array), the arrays in the same order as in memory, and a CRC-32 of everything before it. It is
written to a temporary file, synced and renamed. The previous file is kept and
used if the newest is damaged. Without a usable file the log is read from its beginning.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from isal import isal_zlib

from betrace.service.durable import replacing

_log = logging.getLogger("service.checkpoint")

_MAGIC = b"BTCKPT02"
_HEAD = struct.Struct("<8sQ")  # magic, length of the header
KEPT = 2

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TableSnapshot:
    """One :class:`~betrace.service.traces.table.TraceTable`: its rules as definitions (a JSON
    array), the names of their checks in order, arrays by name, and the signal history of traces
    (:func:`~betrace.service.traces.signal_history.history_to_json`) by slot."""

    version: str
    definitions: bytes
    check_names: list[str]
    arrays: Mapping[str, Array]
    signal_history: list[tuple[int, list[list[Any]]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TenantSnapshot:
    """One :class:`~betrace.service.traces.tenant_traces.TenantTraces`."""

    tenant: str
    services: list[str]
    tables: list[TableSnapshot]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of all traces at ``taken_ns``, and of the log up to the same point."""

    taken_ns: int
    progress: dict[str, tuple[int, list[int]]]
    """By tenant, the last frame of the log, and the frames up to it that were not folded."""
    tenants: list[TenantSnapshot]
    mark: int = 0
    """A ticket: work with smaller tickets must be stored before the snapshot may be used."""
    letters: list[int] = field(default_factory=list)
    """Ids of the dead letters whose spans are in the traces."""
    recorded: dict[str, int] = field(default_factory=dict)
    """By tenant, the last entry of the ledger before the traces were copied."""
    ledger_history: dict[str, Any] = field(default_factory=dict)
    """:meth:`betrace.service.traces.signal_history.LedgerHistory.saved`."""
    partial_folds: dict[str, Any] = field(default_factory=dict)
    """:meth:`betrace.service.traces.partial_folds.PartialFolds.saved`."""


def write_checkpoint(directory: Path, snapshot: Snapshot) -> int:
    """Write a snapshot durably and return its size in bytes. Only the newest ``KEPT`` files stay.

    Raises OSError when the disk fails; existing files stay as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = encode(snapshot)
    # The newest has the largest number, even if the wall clock was set back.
    newest = max((int(path.stem) for path in checkpoint_files(directory)), default=0)
    path = directory / f"{max(snapshot.taken_ns, newest + 1):020d}.checkpoint"
    with replacing(path, directory / "checkpoint.tmp") as file:
        for part in parts:
            file.write(part)
        size = file.tell()
    for old in checkpoint_files(directory)[KEPT:]:
        old.unlink()
    return size


def encode(snapshot: Snapshot) -> list[bytes | memoryview]:
    """A snapshot as bytes, in parts, because its arrays are not copied."""
    arrays: list[Array] = []

    def place(array: Array) -> dict[str, Any]:
        arrays.append(np.ascontiguousarray(array))
        return {"dtype": array.dtype.str, "shape": list(array.shape)}

    header = {
        "taken_ns": snapshot.taken_ns,
        "progress": snapshot.progress,
        "letters": snapshot.letters,
        "recorded": snapshot.recorded,
        "raised": snapshot.ledger_history,
        "unfinished": snapshot.partial_folds,
        "tenants": [
            {
                "tenant": saved.tenant,
                "services": saved.services,
                "tables": [
                    {
                        "version": table.version,
                        "definitions": orjson.Fragment(table.definitions),
                        "check_names": table.check_names,
                        "arrays": {name: place(array) for name, array in table.arrays.items()},
                        "told": table.signal_history,
                    }
                    for table in saved.tables
                ],
            }
            for saved in snapshot.tenants
        ],
    }
    text = orjson.dumps(header)
    parts: list[bytes | memoryview] = [_HEAD.pack(_MAGIC, len(text)), text]
    parts += [array.data.cast("B") for array in arrays if array.nbytes]
    crc = 0
    for part in parts:
        crc = isal_zlib.crc32(part, crc)
    return [*parts, struct.pack("<I", crc)]


def read_latest(directory: Path) -> Snapshot | None:
    """The newest undamaged snapshot, or None."""
    for path in checkpoint_files(directory):
        try:
            return read_checkpoint(path)
        except (OSError, ValueError, KeyError) as error:
            _log.warning("skipped checkpoint %s, trying the previous one: %s", path.name, error)
    return None


def read_checkpoint(path: Path) -> Snapshot:
    """The snapshot in a file. Raises ValueError if it is damaged."""
    return decode(path.read_bytes())


def decode(data: bytes | memoryview) -> Snapshot:
    """The inverse of :func:`encode`. Raises ValueError if the bytes are damaged."""
    if len(data) < _HEAD.size + 4:
        raise ValueError("it is too short")
    magic, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("it has another format")
    if isal_zlib.crc32(memoryview(data)[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ValueError("its checksum does not match")
    header = json.loads(bytes(data[_HEAD.size : _HEAD.size + length]))
    offset = _HEAD.size + length

    def take(place: dict[str, Any]) -> Array:
        nonlocal offset
        dtype, shape = np.dtype(place["dtype"]), place["shape"]
        count = int(np.prod(shape))
        array = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += array.nbytes
        return array

    return Snapshot(
        header["taken_ns"],
        {tenant: (last, pending) for tenant, (last, pending) in header["progress"].items()},
        [
            TenantSnapshot(
                saved["tenant"],
                saved["services"],
                [
                    TableSnapshot(
                        table["version"],
                        orjson.dumps(table["definitions"]),
                        table["check_names"],
                        {name: take(place) for name, place in table["arrays"].items()},
                        table["told"],
                    )
                    for table in saved["tables"]
                ],
            )
            for saved in header["tenants"]
        ],
        letters=header.get("letters", []),
        recorded=header.get("recorded", {}),
        ledger_history=header.get("raised", {}),
        partial_folds=header.get("unfinished", {}),
    )


def checkpoint_files(directory: Path) -> list[Path]:
    """The checkpoints in a directory, newest first."""
    found = (path for path in directory.glob("*.checkpoint") if path.stem.isdigit())
    return sorted(found, reverse=True)
