"""The engine with a span log on disk, from which candidates of relational rules are read back."""

from __future__ import annotations

from collections.abc import Sequence

from betrace.service.otlp.columns import Rows
from betrace.service.pipeline.read_back import ReadBack
from betrace.service.rules.syntax import RuleSyntax
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.reading_pace import ReadingPace
from betrace.service.traces.relational import RelationalRules
from betrace.service.traces.screen import Screen
from betrace.service.traces.signal_history import SignalHistory
from tests.support.engine import Engine, signal_history


class RelationalEngine(Engine):
    """Each engine needs a tenant of its own in the log."""

    def __init__(
        self, rules: Sequence[RuleSyntax], log: SpanLog, tenant: str, incomplete: str = "judge"
    ) -> None:
        super().__init__(rules, tenant, incomplete)
        self._span_log = log
        self._bodies: dict[int, bytes] = {}
        self.read_back = ReadBack(log, 1 << 22)
        self._start()

    def _start(self) -> None:
        self.relational = RelationalRules(self.read_back.traces, self._stored)
        self.relational._pace = ReadingPace(burst_ns=3600 * 10**9)  # open traces are always read
        self.relational._screen = Screen(least_spans=0)

    def _stored(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, SignalHistory]:
        return {trace_id: signal_history(self.signals, trace_id) for trace_id in trace_ids}

    def _spill(self, spilled: Rows) -> None:
        super()._spill(spilled)
        self.read_back.note(self.traces.tenant, spilled)

    def _append(self, bodies: Sequence[bytes]) -> list[int]:
        frames = [Frame("protobuf", "", self.now, body, 1) for body in bodies]
        positions = [int(p) for p in self._span_log.append(self.traces.tenant, frames)]
        self._bodies.update(zip(positions, bodies, strict=True))
        return positions

    def _body(self, position: int) -> bytes:
        return self._bodies[position]

    def restart(self) -> None:
        """Continue from a snapshot; what was remembered of signals is lost."""
        super().restart()
        self._start()
