"""Under which rules spans are folded: those in force when their frame was appended to the log.

The log remembers them (:mod:`betrace.service.storage.spanlog.rule_markers`), so whoever reads a
frame later (a restart, a dead letter, a trace that late spans reopen) finds the same rules.
"""

from __future__ import annotations

import logging
import threading

from cachetools import LRUCache

from betrace.service.otlp.columns import SpanBatch
from betrace.service.pipeline.progress import LogProgress
from betrace.service.rules.compile import CompiledRules
from betrace.service.rules.definition import RuleFileError
from betrace.service.rules.registry import RuleRegistry
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.rule_markers import LoggedRules

_log = logging.getLogger("service.rules")

_KEPT = 32


class RulesOfFrames:
    """The rules of frames in ``log``. Thread-safe; may block."""

    def __init__(self, log: SpanLog, registry: RuleRegistry) -> None:
        self._log = log
        self._registry = registry
        self._lock = threading.Lock()
        # Former rules are compiled once, although nothing else may use them.
        self._former: LRUCache[tuple[str, str], CompiledRules] = LRUCache(_KEPT)

    def at(self, tenant: str, position: int) -> CompiledRules | None:
        """The rules of the frame at ``position``. None if the log does not know them, or if they
        cannot be compiled any more: then those in force now apply."""
        version = self._log.rules_version_at(tenant, position)
        if version is None:
            return None
        with self._lock:
            found = self._former.get((tenant, version))
        if found is not None:
            return found

        def definitions() -> bytes | None:
            logged = self._log.rules_at(tenant, position)
            return logged.definitions if logged is not None else None

        try:
            found = self._registry.version(tenant, version, definitions)
        except RuleFileError as error:
            _log.error(
                "former rules of tenant %s cannot be used in this version, so spans read from the "
                "log are evaluated under its present rules: %s",
                tenant,
                error,
            )
            return None
        if found is not None:
            with self._lock:
                self._former[tenant, version] = found
        return found

    def forget(self, tenant: str) -> None:
        """Drop what is kept for a deleted tenant."""
        with self._lock:
            for key in [key for key in self._former if key[0] == tenant]:
                del self._former[key]


class LogWriter:
    """Appends frames to the span log under the rules in force, and registers them in ``progress``.
    Thread-safe."""

    def __init__(self, log: SpanLog, progress: LogProgress, registry: RuleRegistry) -> None:
        self._log = log
        self._progress = progress
        self._registry = registry

    def is_ready(self, tenant: str, size: int) -> bool:
        """Whether an append of ``size`` bytes now only writes to existing files, and no rules must
        be compiled. Does not block."""
        return self._log.is_ready(tenant, size) and self._registry.ready(tenant)

    def choose_rules(self, batch: SpanBatch) -> None:
        """Set the rules of a batch that is about to be appended. If they cannot be loaded, it has
        none; then the fold fails on them, and its failures are handled."""
        try:
            batch.rules = self._registry.compiled(batch.tenant)
        except Exception as error:
            _log.error("the rules of tenant %s cannot be loaded: %s", batch.tenant, error)

    def append(self, batch: SpanBatch, frames: list[Frame]) -> list[int]:
        """Append the frames of a batch; returns their positions. Raises what
        :meth:`LogProgress.append` and :meth:`SpanLog.append` raise."""
        rules = None
        if isinstance(batch.rules, CompiledRules):
            rules = LoggedRules(batch.rules.version, batch.rules.definitions)
        return self._progress.append(
            batch.tenant, lambda: self._log.append(batch.tenant, frames, rules)
        )
