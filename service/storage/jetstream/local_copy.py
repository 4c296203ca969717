"""Copies spans from the log of a cluster to a local span log, for commands that read much of it.

Reading frames one by one from the servers is slow: each costs a round trip and a whole message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio
import zstandard

from betrace.service.storage.jetstream.envelope import EnvelopeCorrupt, Spans, unpack
from betrace.service.storage.jetstream.history import Located, SpanHistory
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog


@dataclass(slots=True)
class LocalCopy:
    """Copies frames to ``log``. ``tenant_of`` returns the tenant with a name in the streams, None
    if its spans are not wanted."""

    log: SpanLog
    tenant_of: Callable[[str], str | None]
    spans: int = 0
    damaged: list[str] = field(default_factory=list)
    """Messages that cannot be read, or are missing."""
    _compressor: zstandard.ZstdCompressor = field(
        default_factory=lambda: zstandard.ZstdCompressor(level=1)
    )

    async def run(
        self,
        history: SpanHistory,
        ranges: Sequence[range],
        received: tuple[int | None, int | None] = (None, None),
        report: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Copy the messages in ``ranges``, without what edges received before or after a period.
        ``report`` gets the number of spans copied so far. Raises
        :exc:`~betrace.service.storage.jetstream.errors.NatsUnavailable` and
        :exc:`~betrace.service.storage.spanlog.errors.LogWriteError`."""
        async for messages in history.rounds(ranges):
            await trio.to_thread.run_sync(self._add, messages, *received)
            report(self.spans)
        self.damaged += history.gaps

    def _add(self, messages: list[Located], since_ns: int | None, until_ns: int | None) -> None:
        found: dict[str, list[Frame]] = {}
        for partition, message in messages:
            try:
                content = unpack(message.data)
            except EnvelopeCorrupt as error:
                self.damaged.append(f"partition {partition}, message {message.sequence}: {error}")
                continue
            for each in content.frames if isinstance(content, Spans) else ():
                at = each.received_ns
                wanted = (since_ns or 0) <= at and (until_ns is None or at < until_ns)
                tenant = self.tenant_of(each.tenant) if wanted else None
                if tenant is not None:
                    body = self._compressor.compress(each.body)
                    frame = Frame("protobuf", "zstd", at, body, each.spans)
                    found.setdefault(tenant, []).append(frame)
        for tenant, frames in found.items():
            self.log.append(tenant, frames)
            self.spans += sum(frame.spans for frame in frames)
