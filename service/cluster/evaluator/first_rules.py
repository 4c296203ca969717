"""The rules that a partition's log begins with.

Spans may reach the log of a new cluster before rules are published. They are still evaluated with
the first rules: an owner that begins with an empty state waits until rules are published, lets
their markers be appended, and reads the log up to the marker that ends them. Only then does it
apply the log, from its beginning. The first such marker counts, so every owner begins alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from betrace.channels import ThreadRunner
from betrace.service.cluster.rule_keys import PUBLISHED
from betrace.service.storage.jetstream.envelope import EnvelopeCorrupt, RulesMarker, unpack
from betrace.service.storage.jetstream.errors import LogGap
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.jetstream.stream_log import LogMessage

NOT_PUBLISHED = "no query node has published rules yet"

_READ_BYTES = 4 << 20


class FirstRules:
    """Looks for them in the log of a partition."""

    def __init__(self, spans: SpanStreams, threads: ThreadRunner, partition: int) -> None:
        self.markers: list[RulesMarker] = []
        self._spans = spans
        self._threads = threads
        self._partition = partition
        self._after = 0
        self._complete = False

    async def are_complete(self) -> bool:
        """Read on until the marker that ends them, or to the end of the log. Whether that marker
        was found. Raises :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable`."""
        while not self._complete:
            try:
                messages = await self._spans.read(self._partition, self._after, _READ_BYTES, 0.0)
            except LogGap as gap:
                self._after = gap.found - 1
                continue
            if not messages:
                return False
            await self._threads.run(self._note, messages)
            self._after = messages[-1].sequence
        return True

    def _note(self, messages: Sequence[LogMessage]) -> None:
        for message in messages:
            try:
                content = unpack(message.data)
            except EnvelopeCorrupt:
                continue
            if isinstance(content, RulesMarker):
                if content.tenant == PUBLISHED:
                    self._complete = True
                    return
                self.markers.append(content)
