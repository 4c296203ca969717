"""The span log of a cluster as a partition log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream import setup
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.envelope import Spans, TenantFrame, Tick, pack
from betrace.service.storage.jetstream.layout import (
    Layout,
    pack_log_position,
    unpack_log_position,
)
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.spanlog.errors import FrameMissing
from betrace.service.storage.spanlog.frames import Frame
from tests.support.partition_log_conformance import TENANTS, PartitionLogConformance, frame

_ids = itertools.count()


class _StreamHarness:
    """Frames of both tenants go to partition 1."""

    def __init__(self, client: NatsClient, settings: ClusterSettings) -> None:
        self.client = client
        self._layout = Layout.of(settings)
        self.log = SpanStreams(client, self._layout)

    def append_bytes(self, data: bytes) -> int:
        sequence = trio.run(self.log.append, 1, data, f"m{next(_ids)}")
        return pack_log_position(1, sequence)

    def _envelope(self, tenant: str, frame: Frame) -> bytes:
        assert tenant in TENANTS
        body = bytes(frame.payload)
        return pack(Spans([TenantFrame(tenant, frame.received_ns, frame.spans, body)]))

    def append(self, tenant: str, frame: Frame) -> int:
        return self.append_bytes(self._envelope(tenant, frame))

    def append_damaged(self, tenant: str, frame: Frame) -> int:
        data = bytearray(self._envelope(tenant, frame))
        data[-3] ^= 0x10
        return self.append_bytes(bytes(data))

    def forget(self, tenant: str, position: int) -> None:
        _, sequence = unpack_log_position(position)
        trio.run(self.log.forget_before, 1, sequence + 1)

    def beyond(self, tenant: str) -> int:
        return pack_log_position(1, trio.run(self.log.last, 1) + 1)

    def interrupt(self) -> None:
        self.client.call_blocking(lambda nats: nats.nc.force_reconnect())


class TestSpanStreams(PartitionLogConformance):
    @pytest.fixture
    def harness(self, settings: ClusterSettings) -> Iterator[_StreamHarness]:
        client = NatsClient(settings, "test")
        client.start()
        try:
            trio.run(setup.set_up, client, settings)
            yield _StreamHarness(client, settings)
        finally:
            trio.run(client.close)

    def test_an_envelope_has_frames_of_several_tenants(self, harness: _StreamHarness) -> None:
        frames = [TenantFrame(tenant, 5, 2, tenant.encode()) for tenant in TENANTS]
        position = harness.append_bytes(pack(Spans(frames)))
        for tenant in TENANTS:
            expected = Frame("protobuf", "", 5, tenant.encode(), 2)
            assert harness.log.read_many(tenant, [position]) == [expected]
        (found,) = harness.log.read_many("third", [position])
        assert isinstance(found, FrameMissing)
        assert "no frame of tenant third" in str(found)

    def test_positions_of_messages_without_frames_and_of_no_partition(
        self, harness: _StreamHarness
    ) -> None:
        tick = harness.append_bytes(pack(Tick()))
        wrong = [tick, pack_log_position(99, 1), pack_log_position(1, 0), -5]
        found = harness.log.read_many("shop", wrong)
        assert all(isinstance(each, FrameMissing) for each in found)

    def test_reading_while_a_replica_is_behind(
        self, harness: _StreamHarness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from betrace.service.storage.jetstream.errors import NotInStream
        from betrace.service.storage.jetstream.nats import Nats

        async def behind(nats: Nats, stream: str, sequence: int) -> None:
            raise NotInStream("Message Not Found")

        position = harness.append("shop", frame(1))
        monkeypatch.setattr(Nats, "get", behind)
        assert harness.log.read_many("shop", [position]) == [frame(1)]
