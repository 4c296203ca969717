"""The rule files of a tenant in the bucket that query nodes share, and how they are merged with
those on a node's disk.

Each node remembers what every file was like when disk and bucket last agreed. So it knows on which
side a file has changed since then. If it has changed on both sides, the bucket's version counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import zstandard

from betrace.service.rules.store import ALL_TENANTS

FILES_PREFIX = "rules."
_SHARED = "=all"
_FORMAT = 1
_MOST_BYTES = 64 << 20

Texts = Mapping[str, str]
"""Files by path, relative to the directory of rules."""
Digests = dict[str, str]
"""Digests of files by path."""


def files_key(tenant: str) -> str:
    """The key of a tenant's rule files, or of those for all tenants."""
    return FILES_PREFIX + (_SHARED if tenant == ALL_TENANTS else tenant)


def tenant_of(key: str) -> str:
    """The inverse of :func:`files_key`."""
    name = key.removeprefix(FILES_PREFIX)
    return ALL_TENANTS if name == _SHARED else name


def pack_files(texts: Texts) -> bytes:
    """Files as a value of the bucket."""
    value = orjson.dumps({"format": _FORMAT, "files": dict(texts)}, option=orjson.OPT_SORT_KEYS)
    return zstandard.ZstdCompressor(level=3).compress(value)


def unpack_files(value: bytes | None) -> dict[str, str]:
    """The inverse of :func:`pack_files`. Raises :exc:`ValueError`."""
    if value is None:
        return {}
    try:
        text = zstandard.ZstdDecompressor().decompress(value, max_output_size=_MOST_BYTES)
        found = orjson.loads(text)
        if found["format"] != _FORMAT:
            raise ValueError("it was written by a newer version")
        return {str(path): str(each) for path, each in found["files"].items()}
    except (zstandard.ZstdError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def digests(texts: Texts) -> Digests:
    """What tells versions of files apart."""
    return {path: _digest(text) for path, text in texts.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is(text: str | None, known: str | None) -> bool:
    """Whether a file is as it was known; None for no file."""
    return (None if text is None else _digest(text)) == known


@dataclass(slots=True)
class Merge:
    """What makes disk and bucket equal: the files to ``write`` on the disk and to ``publish`` in
    the bucket (None to delete one). ``conflicts`` are files that changed on both sides."""

    write: dict[str, str | None] = field(default_factory=dict)
    publish: dict[str, str | None] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)


def merge(known: Mapping[str, str], disk: Texts, bucket: Texts, skipped: Collection[str]) -> Merge:
    """Compare the files on the disk with those in the bucket. ``known`` has the digests from when
    they last agreed. ``skipped`` cannot be read now."""
    found = Merge()
    for path in sorted((known.keys() | disk.keys() | bucket.keys()) - set(skipped)):
        here, there, before = disk.get(path), bucket.get(path), known.get(path)
        if here == there:
            continue
        if _is(there, before):
            found.publish[path] = here
        else:
            found.write[path] = there
            if not _is(here, before):
                found.conflicts.append(path)
    return found


@dataclass(slots=True)
class AgreedFiles:
    """The digests of all tenants' files when disk and bucket last agreed, as the file ``path``
    keeps them. They are forgotten if the rules are now in other ``directories``: a new directory
    says nothing about what was deleted."""

    path: Path
    directories: list[str]
    digests: dict[str, Digests] = field(default_factory=dict)

    def load(self) -> None:
        """Read the file, if there is one."""
        try:
            found = orjson.loads(self.path.read_bytes())
            if found["directories"] == self.directories:
                self.digests = {
                    str(tenant): {str(path): str(each) for path, each in files.items()}
                    for tenant, files in found["digests"].items()
                }
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            self.digests = {}

    def pack(self) -> bytes:
        """The content of the file."""
        return orjson.dumps({"directories": self.directories, "digests": self.digests})
