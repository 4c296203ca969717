"""Which rules a tenant's frames were appended under: markers in the file ``rules`` of its log.

A marker says that frames at its position and after it, up to the next marker, belong to these
rules. It is written before the first of these frames, so a crash can leave a marker without frames,
but no frames without their marker. Markers follow each other without gaps; all integers are
little-endian::

     0  magic "BTRULES\\n"                    24  i64 position in the span log
     8  u32 crc of all that follows          32  version of the rules, 32 bytes, 0-padded
    12  u32 payload length                   64  payload: the rules' definitions, a JSON array
    16  i64 written, ns since 1970               compressed with zstd

A marker replaces earlier ones at its position or after it. Those are left over if the log lost its
end, or if a crash came before the frames.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import zstandard
from isal.isal_zlib import crc32

from betrace.service.durable import write_atomically
from betrace.service.storage.disk import Disk

_log = logging.getLogger("service.spanlog")

NAME = "rules"
_MAGIC = b"BTRULES\n"
_HEADER = struct.Struct("<8sIIqq32s")
_CHECKED = 12  # offset of what the checksum covers
_VERSION_BYTES = 32
_LEVEL = 3


class LoggedRules(NamedTuple):
    """A version of a tenant's rules, with their definitions
    (:attr:`betrace.service.rules.compile.CompiledRules.definitions`)."""

    version: str
    definitions: bytes


class _Marker(NamedTuple):
    position: int
    version: str
    offset: int  # in the file
    length: int


class RuleMarkers:
    """The markers of one tenant, in ``path``. Thread-safe. The file is read at the first use and
    created by the first marker; its directory must exist by then."""

    def __init__(self, tenant: str, path: Path, disk: Disk) -> None:
        self.path = path
        self._tenant = tenant
        self._disk = disk
        self._lock = threading.Lock()
        self._markers: list[_Marker] | None = None  # by position
        self._end = 0  # of the last whole marker in the file
        self._doubted = False

    def mark(self, position: int, rules: LoggedRules) -> bool:
        """Note that frames from ``position`` on, the end of the log, belong to ``rules``; returns
        whether that needed a marker. Raises :exc:`OSError` if it cannot be written; nothing has
        changed then."""
        with self._lock:
            markers = self._read()
            last = markers[-1] if markers else None
            if (
                last is not None
                and last.version == rules.version
                and last.position <= position
                and not self._doubted
            ):
                return False
            data = _pack(position, rules)
            self._write(data)
            self._keep(_Marker(position, rules.version, self._end, len(data)))
            self._end += len(data)
            self._doubted = False
            return True

    def doubt(self) -> None:
        """Write a marker for the next frames in any case, because the disk may have lost the
        last."""
        self._doubted = True

    def version_at(self, position: int) -> str | None:
        """The version of the rules of the frame at ``position``; None without a marker."""
        with self._lock:
            found = self._at(position)
            return None if found is None else found.version

    def at(self, position: int) -> LoggedRules | None:
        """The rules of the frame at ``position``; None without a marker that can be read."""
        with self._lock:
            found = self._at(position)
            if found is None:
                return None
            try:
                with self.path.open("rb") as file:
                    file.seek(found.offset + _HEADER.size)
                    payload = file.read(found.length - _HEADER.size)
                definitions = zstandard.ZstdDecompressor().decompress(payload)
            except (OSError, zstandard.ZstdError) as error:
                _log.error("the rules in %s cannot be read: %s", self.path, error)
                return None
            return LoggedRules(found.version, definitions)

    def forget_before(self, position: int) -> None:
        """Drop the markers that no frame from ``position`` on needs. If the disk is full, they
        stay."""
        with self._lock:
            markers = self._read()
            superfluous = bisect_right([each.position for each in markers], position) - 1
            if superfluous <= 0:
                return
            with suppress(OSError):
                data = self.path.read_bytes()
                needed = [data[m.offset : m.offset + m.length] for m in markers[superfluous:]]
                write_atomically(self.path, b"".join(needed))
                self._markers = None

    # The caller holds the lock

    def _at(self, position: int) -> _Marker | None:
        markers = self._read()
        found = bisect_right(markers, position, key=lambda each: each.position)
        return markers[found - 1] if found else None

    def _keep(self, marker: _Marker) -> None:
        assert self._markers is not None
        while self._markers and self._markers[-1].position >= marker.position:
            self._markers.pop()
        self._markers.append(marker)

    def _read(self) -> list[_Marker]:
        if self._markers is None:
            try:
                data = self.path.read_bytes()
            except FileNotFoundError:
                data = b""
            self._markers, self._end = [], 0
            damaged = 0
            for marker in _find(data):
                damaged += marker.offset - self._end
                self._keep(marker)
                self._end = marker.offset + marker.length
            if not _torn(data[self._end :]):
                damaged += len(data) - self._end
            if damaged:
                _log.error(
                    "%d bytes of %s are damaged: if spans of tenant %s are read from the log, some "
                    "may be evaluated under earlier rules",
                    damaged,
                    self.path,
                    self._tenant,
                )
        return self._markers

    def _write(self, data: bytes) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(descriptor).st_size > self._end:  # the rest of an interrupted write
                self._disk.truncate(descriptor, self._end)
            self._disk.write_all(descriptor, [data], self._end)
        finally:
            os.close(descriptor)


def _pack(position: int, rules: LoggedRules) -> bytes:
    version = rules.version.encode()
    if len(version) > _VERSION_BYTES:
        raise ValueError(f"the version of the rules has more than {_VERSION_BYTES} bytes")
    payload = zstandard.ZstdCompressor(_LEVEL).compress(rules.definitions)
    fields = len(payload), time.time_ns(), position, version
    crc = crc32(payload, crc32(_HEADER.pack(_MAGIC, 0, *fields)[_CHECKED:]))
    return _HEADER.pack(_MAGIC, crc, *fields) + payload


def _find(data: bytes) -> Iterator[_Marker]:
    """The whole markers in a file, in their order."""
    offset = data.find(_MAGIC)
    while offset >= 0:
        marker = _parse(data, offset)
        if marker is not None:
            yield marker
        following = offset + (marker.length if marker is not None else 1)
        offset = data.find(_MAGIC, following)


def _torn(rest: bytes) -> bool:
    """Whether the end of a file can be the beginning of a marker."""
    return len(rest) < _HEADER.size or len(rest) < _HEADER.size + _HEADER.unpack_from(rest)[2]


def _parse(data: bytes, offset: int) -> _Marker | None:
    if offset + _HEADER.size > len(data):
        return None
    _, crc, length, _, position, version = _HEADER.unpack_from(data, offset)
    end = offset + _HEADER.size + length
    if end > len(data) or crc != crc32(memoryview(data)[offset + _CHECKED : end]):
        return None
    return _Marker(position, version.rstrip(b"\0").decode("utf-8", "replace"), offset, end - offset)
