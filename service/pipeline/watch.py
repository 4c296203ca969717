"""Looks once a second at what changes without telling: stalled stages and refused requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import trio

from betrace.channels import Stage
from betrace.service.pipeline.pipeline import Queue
from betrace.service.receiver.admission import Edge
from betrace.service.telemetry import events

LOOK_SECONDS = 1.0
QUIET_SECONDS = 5.0
REASONS = ("overloaded", "memory", "unavailable", "quota")
"""Of refusals that are a state of the service, not the fault of a request."""


@dataclass(slots=True)
class _Episode:
    """Requests are being refused for one reason."""

    began: float
    last: float
    requests: int  # refused before it
    spans: int


class Watch:
    """Logs when a stage stalls and recovers, and when requests are refused and accepted again."""

    def __init__(
        self,
        stages: Mapping[str, Stage[object]],
        queues: Mapping[str, Queue],
        edge: Edge,
        stall_seconds: float,
    ) -> None:
        self._stages = stages
        self._queues = queues
        self._edge = edge
        self._stall_seconds = stall_seconds
        self._stalled: set[str] = set()
        self._seen = dict.fromkeys(REASONS, 0)
        self._seen_spans = dict.fromkeys(REASONS, 0)
        self._episodes: dict[str, _Episode] = {}

    async def run(self) -> None:
        """Look for ever."""
        while True:
            self.look()
            await trio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Look now."""
        for name, stage in self._stages.items():
            self._look_at_stage(name, stage.stalled(self._stall_seconds))
        for reason in REASONS:
            self._look_at_refusals(reason, trio.current_time())

    def _look_at_stage(self, name: str, stalled: bool) -> None:
        if stalled == (name in self._stalled):
            return
        if stalled:
            self._stalled.add(name)
            queue = self._queues[name]
            events.STAGE_STALLED(
                stage=name,
                size=queue.send.statistics().size,
                unit=queue.unit,
                seconds=self._stall_seconds,
            )
        else:
            self._stalled.discard(name)
            events.STAGE_RECOVERED(stage=name)

    def _look_at_refusals(self, reason: str, now: float) -> None:
        requests = self._edge.refused_requests[reason]
        spans = self._edge.refused_spans[reason]
        episode = self._episodes.get(reason)
        if requests > self._seen[reason]:
            if episode is None:
                before, spans_before = self._seen[reason], self._seen_spans[reason]
                self._episodes[reason] = _Episode(now, now, before, spans_before)
                events.REFUSING(reason=reason)
            else:
                episode.last = now
        elif episode is not None and now - episode.last >= QUIET_SECONDS:
            del self._episodes[reason]
            events.ACCEPTING(
                reason=reason,
                requests=requests - episode.requests,
                spans=spans - episode.spans,
                seconds=episode.last - episode.began,
            )
        self._seen[reason] = requests
        self._seen_spans[reason] = spans
