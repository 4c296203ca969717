"""All partitions of a cluster that is resized, without NATS: logs, outputs, and their owners."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.cluster.evaluator.stragglers import split_again
from betrace.service.config.settings import Settings
from betrace.service.otlp.partition import partition_numbers
from betrace.service.signals import Signal
from betrace.service.storage.jetstream.envelope import (
    Envelope,
    RulesMarker,
    Seal,
    Spans,
    TenantFrame,
    Tick,
    pack,
)
from betrace.service.storage.jetstream.generations import Generation, Generations
from betrace.service.storage.jetstream.layout import unpack_log_position
from betrace.service.storage.spanlog.errors import FrameMissing
from betrace.service.storage.spanlog.frames import Frame
from tests.support.partition_world import (
    MS,
    SETTINGS,
    START_NS,
    FakeIndex,
    Owner,
    PartitionWorld,
    definitions,
)
from tests.support.spans import S, body


class OnePartition(PartitionWorld):
    """A partition of a :class:`ResizedWorld`."""

    def __init__(self, world: ResizedWorld, partition: int, of: int) -> None:
        super().__init__(world.settings)
        self.world, self.partition, self.of = world, partition, of
        self.index = FakeIndex()
        self.index._rows, self.index._signals = world.rows, world.stored

    def begin(self, state: PartitionState) -> None:
        parent = self.world.generations.parent(self.partition)
        if parent is None:
            return
        own = self.world.generations.of_partition(self.partition)

        def wanted(tenant, ids):
            return own.first + partition_numbers(tenant, ids, own.count) == self.partition

        state.inherit(self.world.final[parent], wanted)

    def missing(self, state: PartitionState) -> str | None:
        if not state.index_sequence and state.inherited_output is not None:
            parent, needed = state.inherited_output
            if self.world.parts[parent].index.applied < needed:
                return f"the output of partition {parent} is not applied"
        return super().missing(state)

    def _frame(self, tenant: str, position: int) -> Frame | FrameMissing:
        partition, _ = unpack_log_position(position)
        if partition != self.partition:
            return self.world.parts[partition]._frame(tenant, position)
        return super()._frame(tenant, position)


class ResizedWorld:
    """Partitions whose servers have one clock."""

    def __init__(self, partitions: int, settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.generations = Generations.of(partitions)
        self.rows: dict = {}
        self.stored: dict = {}
        self.final: dict[int, bytes] = {}
        self.parts: dict[int, OnePartition] = {}
        self.owners: dict[int, Owner] = {}
        self.now_ns = START_NS
        self.sent: list[tuple[str, S]] = []
        self.revision = 0
        self._forwarded: dict[int, int] = {}
        self.prepare()
        self._own()

    def _own(self) -> None:
        for partition in self.generations.current.partitions:
            self.owners[partition] = Owner(self.parts[partition])

    @property
    def current(self) -> list[OnePartition]:
        return [self.parts[each] for each in self.generations.current.partitions]

    # The logs

    def append(self, partition: int, message: Envelope) -> None:
        part = self.parts[partition]
        part.now_ns = self.now_ns
        part.append(pack(message), 0)

    def spans(
        self, spans: dict[str, Sequence[S]], after_ms: int = 30, stale: Generation | None = None
    ) -> None:
        """Append spans; ``stale`` is the generation that the edge knows."""
        self.now_ns += after_ms * MS
        generation = stale or self.generations.current
        frames: dict[int, list[TenantFrame]] = defaultdict(list)
        for tenant, some in spans.items():
            self.sent += [(tenant, span) for span in some]
            by_partition: dict[int, list[S]] = defaultdict(list)
            for span in some:
                by_partition[generation.partition_of(tenant, span.trace)].append(span)
            for partition, own in by_partition.items():
                frame = TenantFrame(tenant, self.now_ns, len(own), body(*own))
                frames[partition].append(frame)
        for partition, several in frames.items():
            self.append(partition, Spans(several))

    def rules(self, tenant: str, *conditions: str) -> None:
        self.revision += 1
        self.now_ns += MS
        for part in self.current:
            marker = RulesMarker(tenant, self.revision, definitions(*conditions))
            self.append(part.partition, marker)

    def quiet(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.now_ns += 500 * MS
            for part in self.current:
                self.append(part.partition, Tick())

    # The owners

    def finish(self) -> None:
        """Apply everything, and let the index apply what is stored."""
        for generation in self.generations:
            for partition in generation.partitions:
                self.owners[partition].finish()
                self.parts[partition].project()

    def grow(self, partitions: int) -> None:
        """Change the number of partitions: spans go to the new ones from now on."""
        self.generations = self.generations.grown(partitions)

    def seal(self) -> None:
        """Seal the former partitions, and let the new ones begin."""
        former = self.generations.listed[-2]
        for part in self.parts.values():
            part.project()
        for partition in former.partitions:
            self.append(partition, Seal())
            owner = self.owners[partition]
            owner.finish()
            assert owner.state.sealed
            self.final[partition] = owner.state.snapshot(len(self.parts[partition].out))
        self._own()

    def prepare(self) -> None:
        """Create the new partitions' logs, which take spans before their owners begin."""
        current = self.generations.current
        for partition in current.partitions:
            self.parts[partition] = OnePartition(self, partition, current.count)

    def forward_new(self) -> None:
        """Forward what came after the seals, once."""
        for former in self.generations.listed[:-1]:
            for partition in former.partitions:
                sealed = self.owners[partition].state.applied
                done = max(sealed, self._forwarded.get(partition, 0))
                self._forwarded[partition] = len(self.parts[partition].log)
                for message in self.parts[partition].log[done:]:
                    for to, data in split_again(message, self.generations.current):
                        self.parts[to].now_ns = self.now_ns
                        self.parts[to].append(data, 0)

    @property
    def signals(self) -> list[Signal]:
        return [signal for part in self.parts.values() for signal in part.signals]

    @property
    def closed(self) -> list[tuple[str, str, int]]:
        return [each for part in self.parts.values() for each in part.closed]
