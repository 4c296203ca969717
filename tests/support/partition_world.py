"""A partition's log, its output, an index of what was stored, and owners that crash. For tests
only: no NATS, no threads, no clocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from betrace.service.cluster import output
from betrace.service.cluster.evaluator.state import Anchor, PartitionState
from betrace.service.cluster.output import Output
from betrace.service.cluster.tenant_entries import GONE
from betrace.service.config.settings import Settings
from betrace.service.pipeline.history import HistoryUnavailable
from betrace.service.signals import Kind, Signal
from betrace.service.storage.duck.queries import TraceRow
from betrace.service.storage.jetstream.envelope import (
    RulesMarker,
    Spans,
    TenantFrame,
    Tick,
    pack,
    unpack,
)
from betrace.service.storage.jetstream.layout import unpack_log_position
from betrace.service.storage.jetstream.stream_log import LogMessage
from betrace.service.storage.spanlog.errors import FrameMissing
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.traces.layout import (
    FLAGS,
    HI,
    LO,
    PARTIAL,
    POSITION_0,
    POSITION_COUNT,
    SPANS,
)
from betrace.service.traces.verdicts import Decided
from tests.support.spans import S, body

MS = 1_000_000
SECOND = 1000 * MS
START_NS = 1_800_000_000 * SECOND

SETTINGS = Settings.model_validate(
    {
        "traces": {"idle_seconds": 2, "max_age_seconds": 60, "sweep_seconds": 3},
        "caches": {"trace_metadata": 1, "trace_metadata_ttl_seconds": 3},
    }
)

TIGHT = Settings.model_validate(
    {
        "traces": {"idle_seconds": 2, "max_age_seconds": 3, "sweep_seconds": 1, "max_open": 40},
        "caches": {"trace_metadata": 1, "trace_metadata_ttl_seconds": 1},
    }
)
"""At most three open traces in a partition."""


def definitions(*conditions: str) -> bytes:
    """Rules r0, r1, ... as in a marker."""
    return orjson.dumps([{"id": f"r{i}", "condition": each} for i, each in enumerate(conditions)])


class PartitionWorld:
    """The streams of partition 3 of 16, and the index at a query node."""

    partition = 3
    of = 16

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.log: list[LogMessage] = []
        self.now_ns = START_NS
        self.sent: list[tuple[str, S]] = []
        self.revision = 0
        self.out: list[bytes] = []
        self.readable = True
        """Whether frames can be read from the log."""
        self.index = FakeIndex()

    def begin(self, state: PartitionState) -> None:
        """Give a state what the partition begins with."""

    def missing(self, state: PartitionState) -> str | None:
        """Why the index may not answer yet, or None."""
        applied, needed = self.index.applied, state.index_sequence
        return None if applied >= needed else f"{applied} are applied, {needed} are needed"

    # The log

    def append(self, data: bytes, after_ms: int = 30) -> None:
        """Append a message, so long after the last one by the server's clock."""
        self.now_ns += after_ms * MS
        self.log.append(LogMessage(len(self.log) + 1, self.now_ns, data))

    def spans(self, spans: dict[str, Sequence[S]], after_ms: int = 30) -> None:
        """Append spans of tenants."""
        self.sent += [(tenant, span) for tenant, some in spans.items() for span in some]
        frames = [
            TenantFrame(tenant, self.now_ns, len(some), body(*some))
            for tenant, some in spans.items()
        ]
        self.append(pack(Spans(frames)), after_ms)

    def tick(self, after_ms: int = 500) -> None:
        """Append a tick."""
        self.append(pack(Tick()), after_ms)

    def rules(self, tenant: str, *conditions: str, revision: int | None = None) -> None:
        """Append a marker; by default with the next revision."""
        self.revision += 1
        number = self.revision if revision is None else revision
        self.append(pack(RulesMarker(tenant, number, definitions(*conditions))), 1)

    def delete(self, tenant: str) -> int:
        """Append the marker of a tenant's deletion; returns the generation after it."""
        self.revision += 1
        self.append(pack(RulesMarker(GONE + tenant, self.revision, b"")), 1)
        return self.revision

    def quiet(self, seconds: float) -> None:
        """Append ticks, as the owner of a partition without spans does."""
        for _ in range(int(seconds * 2)):
            self.tick()

    def read_many(self, tenant: str, positions: Sequence[int]) -> list[Frame | FrameMissing]:
        """As of the log of a cluster."""
        if not self.readable:
            raise HistoryUnavailable("the log cannot be read, says the test")
        return [self._frame(tenant, position) for position in positions]

    def _frame(self, tenant: str, position: int) -> Frame | FrameMissing:
        partition, sequence = unpack_log_position(position)
        assert partition == self.partition
        content = unpack(self.log[sequence - 1].data)
        assert isinstance(content, Spans)
        for frame in content.frames:
            if frame.tenant == tenant:
                return Frame("protobuf", "", frame.received_ns, frame.body, frame.spans)
        return FrameMissing(position)

    # The output

    @property
    def outputs(self) -> list[Output]:
        """What is stored in the output."""
        return [output.unpack(each) for each in self.out]

    @property
    def signals(self) -> list[Signal]:
        """The signals in the output, in order."""
        return [s for each in self.outputs for d in each.decided for s in d.signals]

    def signals_of(self, tenant: str) -> list[dict[str, Any]]:
        """A tenant's signals in the output, in order."""
        return [signal.to_json() for signal in self.signals if signal.tenant == tenant]

    @property
    def closed(self) -> list[tuple[str, str, int]]:
        """Tenant, trace and number of spans of the traces in the output, in order."""
        return [
            (d.tenant, d.closed.trace_id(k), int(d.closed.rows[k, SPANS]))
            for each in self.outputs
            for d in each.decided
            if d.closed is not None
            for k in range(len(d.closed))
        ]

    def project(self, count: int | None = None) -> None:
        """Let the index apply so many messages of the output, or all."""
        for _ in range(len(self.out) if count is None else count):
            if self.index.applied < len(self.out):
                self.index.apply(output.unpack(self.out[self.index.applied]))


class FakeIndex:
    """The stored traces and signals."""

    def __init__(self) -> None:
        self.applied = 0
        self.reachable = True
        self.asked = 0
        self._rows: dict[tuple[str, str], TraceRow] = {}
        self._signals: dict[str, Signal] = {}

    def apply(self, found: Output) -> None:
        """Store an output."""
        self.applied += 1
        for decided in found.decided:
            self._signals.update((signal.id, signal) for signal in decided.signals)
            self._store(decided)

    def _store(self, decided: Decided) -> None:
        spilled: dict[tuple[int, int], set[int]] = {}
        for hi, lo, *positions in () if decided.spilled is None else decided.spilled.tolist():
            spilled.setdefault((hi, lo), set()).update(positions)
        closed = decided.closed
        for k in range(0 if closed is None else len(closed)):
            assert closed is not None
            row = closed.rows[k]
            trace_id = closed.trace_id(k)
            before = self._rows.get((decided.tenant, trace_id))
            positions = set() if before is None else set(before.positions)
            positions |= set(row[POSITION_0 : POSITION_0 + row[POSITION_COUNT]].tolist())
            positions |= spilled.pop((int(row[HI]), int(row[LO])), set())
            self._rows[decided.tenant, trace_id] = TraceRow(
                trace_id,
                *(0, 0, 0, 0),
                int(row[SPANS]),
                *(0, None, None, []),
                bool(row[FLAGS] & PARTIAL),
                closed.rules.version,
                sorted(positions),
            )
        assert not spilled  # all in one frame here

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        """As of :class:`betrace.service.pipeline.history.TraceIndex`."""
        self.asked += 1
        if not self.reachable:
            raise HistoryUnavailable("the index cannot be reached, says the test")
        found = {each: self._rows.get((tenant, each)) for each in trace_ids}
        return {each: row for each, row in found.items() if row is not None}

    def raised_of(
        self, tenant: str, trace_ids: Sequence[str]
    ) -> dict[str, list[tuple[str, str, int, int, str]]]:
        """As of :class:`betrace.service.pipeline.history.TraceIndex`."""
        found: dict[str, dict[tuple[str, str], list[Any]]] = {}
        for each in self._signals.values():
            if each.tenant == tenant and each.trace_id in trace_ids:
                row = found.setdefault(each.trace_id, {}).setdefault(
                    (each.rule_id, each.rule_version), [0, 0, each.clause]
                )
                row[each.kind is Kind.RETRACTED] += 1
        return {
            trace_id: [(*rule, *row) for rule, row in rules.items()]
            for trace_id, rules in found.items()
        }


class _IndexOfOwner:
    """The index as an owner asks it: only if it has applied enough."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def find_traces(self, tenant: str, trace_ids: Sequence[str]) -> dict[str, TraceRow]:
        index, reason = self._owner.world.index, self._owner.world.missing(self._owner.state)
        if reason is not None:
            raise HistoryUnavailable(reason)
        return index.find_traces(tenant, trace_ids)

    def raised_of(
        self, tenant: str, trace_ids: Sequence[str]
    ) -> dict[str, list[tuple[str, str, int, int, str]]]:
        return self._owner.world.index.raised_of(tenant, trace_ids)


class Owner:
    """Owns the partition from a checkpoint on, or from the beginning."""

    def __init__(self, world: PartitionWorld, checkpoint: bytes | None = None) -> None:
        self.world = world
        log: Any = world
        self.state = PartitionState(
            world.partition, world.of, world.settings, log, _IndexOfOwner(self)
        )
        after = 0
        if checkpoint is None:
            world.begin(self.state)
        else:
            anchor, after = self.state.restore(checkpoint)
            if anchor.sequence:
                assert anchor == Anchor.of(world.log[anchor.sequence - 1])
        for number, each in enumerate(world.out[after:], after + 1):
            self.state.note(output.unpack(each), number)
        self.waiting: Output | None = None

    def apply(self, count: int | None = None, store: bool = True) -> None:
        """Apply so many messages of the log, or all; store the results, or keep them waiting."""
        first = self.state.received
        until = len(self.world.log) if count is None else first + count
        found = self.state.apply(self.world.log[first:until])
        if self.waiting is None:
            self.waiting = found
        elif found is not None:
            self.waiting.add(found)
        if store:
            self.store()

    def store(self, most_bytes: int = output.MOST_BYTES, parts: int | None = None) -> None:
        """Append the waiting results to the output; with ``parts``, crash after so many
        messages."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            self.world.out += output.pack(waiting, most_bytes)[:parts]
            self.state.stored(waiting.step, len(self.world.out))

    def finish(self) -> None:
        """Apply everything; the index applies what is stored."""
        self.apply()
        for _ in range(10_000):
            if self.state.waiting is None:
                return
            self.world.project()
            self.apply()
        raise AssertionError(f"still waiting: {self.state.waiting}")
