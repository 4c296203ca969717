"""Checks once a second for changes that nothing else reports: stalled stages, refused requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trio

from betrace.channels import Stage
from betrace.service.pipeline.pipeline import MeasuredChannel
from betrace.service.telemetry import events

CHECK_SECONDS = 1.0
QUIET_SECONDS = 5.0
REASONS = ("overloaded", "memory", "unavailable", "quota", "backlog")
"""Reasons of refusal that are a state of the service, not the fault of a request."""


@dataclass(slots=True)
class _Episode:
    """Requests are being refused for one reason."""

    began: float
    last: float
    requests: int  # refused before it began
    spans: int


class Watch:
    """Logs when a stage stalls and recovers, and when requests are refused and accepted again.

    ``refused_requests`` and ``refused_spans`` are live counters by reason.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage[object]],
        channels: Mapping[str, MeasuredChannel[Any]],
        refused_requests: Mapping[str, int],
        refused_spans: Mapping[str, int],
        stall_seconds: float,
    ) -> None:
        self._stages = stages
        self._channels = channels
        self._refused_requests = refused_requests
        self._refused_spans = refused_spans
        self._stall_seconds = stall_seconds
        self._stalled: set[str] = set()
        self._seen = dict.fromkeys(REASONS, 0)
        self._seen_spans = dict.fromkeys(REASONS, 0)
        self._episodes: dict[str, _Episode] = {}

    async def run(self) -> None:
        """Check once a second, forever."""
        while True:
            self.check()
            await trio.sleep(CHECK_SECONDS)

    def check(self) -> None:
        """Check now."""
        for name, stage in self._stages.items():
            self._check_stage(name, stage.stalled(self._stall_seconds))
        for reason in REASONS:
            self._check_refusals(reason, trio.current_time())

    def _check_stage(self, name: str, stalled: bool) -> None:
        if stalled == (name in self._stalled):
            return
        if stalled:
            self._stalled.add(name)
            channel = self._channels[name]
            events.STAGE_STALLED(
                stage=name,
                size=channel.send.statistics().size,
                unit=channel.unit,
                seconds=self._stall_seconds,
            )
        else:
            self._stalled.discard(name)
            events.STAGE_RECOVERED(stage=name)

    def _check_refusals(self, reason: str, now: float) -> None:
        requests = self._refused_requests[reason]
        spans = self._refused_spans[reason]
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
