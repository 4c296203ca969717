"""Files of dead letters that no longer fit in their store.

A file is named ``<time>-<first id>.jsonl.gz``. It has one letter per line, as JSON, with the
payload in base64.
"""

from __future__ import annotations

import base64
import gzip
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from betrace.service.durable import replacing, sync_directory


class LetterExports:
    """The files in ``directory``. All methods block; they raise OSError if the disk fails."""

    def __init__(self, directory: Path, clock_ns: Callable[[], int]) -> None:
        self._directory = directory
        self._clock_ns = clock_ns
        self._rewriting = threading.Lock()

    def write(self, letters: Iterable[tuple[Mapping[str, Any], bytes]], first_id: int) -> None:
        """Write letters, each with its payload, to a new file; it is durable when this returns."""
        self._directory.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock_ns() / 1e9))
        path = self._directory / f"{stamp}-{first_id}.jsonl.gz"
        with replacing(path) as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
            for letter, payload in letters:
                shown = {**letter, "payload": base64.b64encode(payload).decode()}
                file.write(orjson.dumps(shown, option=orjson.OPT_APPEND_NEWLINE))

    def drop(self, tenant: str) -> int:
        """Remove a tenant's letters from all files; returns how many."""
        with self._rewriting:
            paths = sorted(self._directory.glob("*.jsonl.gz")) if self._directory.is_dir() else ()
            return sum(_rewrite_without(path, tenant) for path in paths)


def _rewrite_without(path: Path, tenant: str) -> int:
    """Remove a tenant's letters from an exported file; returns how many it had."""

    def lines(of_tenant: bool) -> Iterator[bytes]:
        with gzip.open(path) as source:
            for line in source:
                if (orjson.loads(line)["tenant"] == tenant) == of_tenant:
                    yield line

    gone = sum(1 for _ in lines(of_tenant=True))
    if not gone:
        return 0
    if next(lines(of_tenant=False), None) is None:
        path.unlink()
        sync_directory(path.parent)
        return gone
    with replacing(path) as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
        file.writelines(lines(of_tenant=False))
    return gone
