"""The ``OUT`` streams as queues of signals, for exports and alerts.

A signal's number is the sequence of its message. Query nodes agree on these numbers, unlike on
those of their ledgers, so any of them can continue where another one stopped.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from betrace.service.cluster import output
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.feed import OutLog
from betrace.service.cluster.query.recent_output import RecentOutput
from betrace.service.cluster.query.tenant_names import TenantNames
from betrace.service.signals import Signal
from betrace.service.storage.jetstream.errors import LogGap, NatsUnavailable
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.storage.signal_queues import QueuePage, SignalsUnavailable

READ_BYTES = 4 << 20


class OutQueues:
    """The queues, which are named by the number of the partition. Make it on the Trio thread; the
    methods that block are for other threads.

    ``last`` returns the last sequence of a partition's stream. What ``names`` says belongs to
    deleted tenants is left out.
    """

    def __init__(
        self,
        partitions: PartitionMap,
        log_of: Callable[[int], OutLog],
        last: Callable[[int], Awaitable[int]],
        recent: RecentOutput,
        names: TenantNames,
    ) -> None:
        self._partitions = partitions
        self._log_of = log_of
        self._last = last
        self._recent = recent
        self._names = names
        self._token = trio.lowlevel.current_trio_token()

    def names(self) -> list[str]:
        """The partitions."""
        return [str(partition) for partition in range(self._partitions.generations.total)]

    def of(self, signals: Iterable[Signal]) -> set[str]:
        """The partitions of these signals; of those that continue one another, all."""
        return {
            str(generation.partition_of(each.tenant, bytes.fromhex(each.trace_id)))
            for each in signals
            for generation in self._partitions.generations
        }

    def end(self, name: str) -> int:
        """The sequence of the last message."""
        try:
            return trio.from_thread.run(self._last, int(name), trio_token=self._token)
        except NatsUnavailable as error:
            raise SignalsUnavailable(str(error)) from error

    def may_read(self, name: str, done: Mapping[str, int]) -> bool:
        """Not before the output of the partition's parent was read to its end."""
        parent = self._partitions.generations.parent(int(name))
        if parent is None:
            return True
        finished = self._partitions.finished.get(parent)
        return finished is not None and done.get(str(parent), 0) >= finished.output

    def read(self, name: str, after: int, limit: int) -> QueuePage:
        """The signals of whole messages after a sequence."""
        page = self._recent.read(int(name), after, limit)
        if page is None:
            page = self._read_stream(int(name), after)
        if self._names.unknown({signal.tenant for _, signal in page.signals}):
            raise SignalsUnavailable("a tenant that was created again is not known here yet")
        current = ((number, self._names.signal(signal)) for number, signal in page.signals)
        kept = [(number, signal) for number, signal in current if signal is not None]
        return QueuePage(kept, page.upto, page.more)

    def _read_stream(self, partition: int, after: int) -> QueuePage:
        async def read() -> list[LogMessage]:
            return await self._log_of(partition).read(after, None, READ_BYTES, 0.0)

        try:
            messages = trio.from_thread.run(read, trio_token=self._token)
            found = [
                (message.sequence, signal)
                for message in messages
                if message.data  # records of epochs have none
                for decided in output.unpack(message.data).decided
                for signal in decided.signals
            ]
        except (NatsUnavailable, LogGap, output.OutputCorrupt) as error:
            raise SignalsUnavailable(f"OUT of partition {partition}: {error}") from error
        return QueuePage(found, messages[-1].sequence if messages else after, bool(messages))
