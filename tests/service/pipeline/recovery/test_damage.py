"""Damage of the span log is counted, logged and shown, and says what was lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from betrace.service.api.components import components
from betrace.service.config.settings import Settings
from betrace.service.config.stages import Traces
from betrace.service.pipeline.request import Done
from betrace.service.storage.spanlog.frames import FILE_HEADER_BYTES, FRAME_HEADER_BYTES
from tests.support.api_client import ApiClient
from tests.support.inprocess import (
    closed,
    folded,
    ledger_signals,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.spans import S


@pytest.fixture
def config(tmp_path):
    write_rules(tmp_path, {"no-b": "when { a } always { b }"})
    return settings(tmp_path)


def slow(config: Settings) -> Settings:
    """The settings with traces that stay open."""
    return config.model_copy(update={"traces": Traces(idle_seconds=60)})


def trace(number: int) -> bytes:
    return bytes([number]) * 16


async def three_requests(config) -> tuple[Path, list[int], list[int]]:
    """Send three requests and die; the segment, the frames' offsets, and when they came."""
    async with running(slow(config), die=True) as service:
        for number in (1, 2, 3):
            assert await send(service, [S(number, "a", trace=trace(number))]) == Done(1)
        (segment,) = service.log.segments("default")
        frames = list(service.log.frames("default"))
    shutil.rmtree(config.storage.path / "checkpoints", ignore_errors=True)  # read everything again
    return segment.path, [p & 0xFFFFFFFF for p, _ in frames], [f.received_ns for _, f in frames]


def overwrite(path: Path, offset: int, size: int) -> None:
    content = bytearray(path.read_bytes())
    for at in range(offset, min(offset + size, len(content))):
        content[at] ^= 0x5A
    path.write_bytes(content)


PARTS = {  # offset in the frame, bytes, and whether the number of lost spans is then still known
    "magic": (0, 4, False),
    "salt": (4, 8, False),
    "checksum of the frame": (12, 4, True),
    "checksum of the header": (16, 4, False),
    "length": (28, 4, False),
    "payload": (FRAME_HEADER_BYTES, 1, True),
    "everything": (0, 30, False),
}
ENDS = ("checksum of the header", "payload")


@pytest.mark.parametrize(
    ("number", "part"),
    [(1, part) for part in PARTS] + [(number, part) for number in (0, 2) for part in ENDS],
)
async def test_a_damaged_frame_is_reported_with_what_is_lost(config, caplog, number, part):
    at, size, known = PARTS[part]
    caplog.set_level("INFO")
    path, offsets, received = await three_requests(config)
    overwrite(path, offsets[number] + at, size)
    async with running(config) as service:
        assert service.recovery.replayed.damaged == 1
        assert service.recovery.replayed.spans == 2
        damage = service.log.damage
        assert (damage.places, damage.spans) == (1, int(known))
        (found,) = damage.skipped
        assert (found.tenant, found.offset) == ("default", offsets[number])
        assert found.since_ns <= received[number] <= found.until_ns
        if number == 1 and not known:
            assert (found.since_ns, found.until_ns) == (received[0], received[2])
        shown = components(service.sources)["span-log"]
        assert shown["status"] == "degraded"
        assert "1 damaged places in the logs of 1 tenants" in shown["detail"]
        metrics = (await ApiClient(service).get("/metrics")).decode()
        assert "betrace_span_log_damaged_places_total 1" in metrics
        assert f"betrace_span_log_damaged_spans_total {int(known)}" in metrics
        await closed(service)
        assert len(ledger_signals(service)) == 2
    assert f"the span log of default is damaged: {found.bytes} bytes" in caplog.text
    assert "2 spans from the log; 1 could not be read" in caplog.text


async def test_a_damaged_file_header_loses_nothing(config):
    path, _, _ = await three_requests(config)
    overwrite(path, 0, FILE_HEADER_BYTES)
    async with running(config) as service:
        assert service.recovery.replayed.spans == 3
        (found,) = service.log.damage.skipped
        assert found.lost == "no spans"
        assert components(service.sources)["span-log"]["status"] == "degraded"


async def test_an_interrupted_write_is_not_damage(config, caplog):
    caplog.set_level("INFO")
    path, offsets, _ = await three_requests(config)
    os.truncate(path, offsets[2] + 20)
    async with running(config) as service:
        assert service.recovery.replayed.damaged == 0
        assert service.recovery.replayed.spans == 2
        assert components(service.sources)["span-log"]["status"] == "ok"
    assert "cut 20 bytes off the span log of default" in caplog.text


async def test_damage_before_the_checkpoint_is_reported_when_it_is_read(config):
    async with running(config) as service:
        assert await send(service, [S(1, "a")]) == Done(1)
        await closed(service)
        (segment,) = service.log.segments("default")
        ((position, _),) = service.log.frames("default")
    overwrite(segment.path, FILE_HEADER_BYTES + FRAME_HEADER_BYTES, 4)
    async with running(config) as service:
        service.log.read_many("default", [position])
        service.log.read_many("default", [position])
        assert (service.log.damage.places, service.log.damage.spans) == (1, 1)


@pytest.mark.parametrize("gone", ["end", "segment", "log"])
async def test_new_spans_do_not_take_the_places_of_lost_ones(config, gone):
    """The end of the log, which a checkpoint contains, is lost. Frames at the same positions would
    count as folded after the next crash."""
    async with running(config, die=True) as service:
        for number in (1, 2, 3):
            assert await send(service, [S(number, "a", trace=trace(number))]) == Done(1)
        await folded(service)
        assert await service.recovery.save()
        (segment,) = service.log.segments("default")
    if gone == "end":
        os.truncate(segment.path, FILE_HEADER_BYTES)
    elif gone == "segment":
        segment.path.unlink()
    else:
        shutil.rmtree(config.storage.path / "default/log")
    async with running(config, die=True) as service:
        assert "the end of the log is missing" in [s.reason for s in service.log.skipped]
        assert await send(service, [S(4, "a", trace=trace(4))]) == Done(1)
    async with running(config) as service:
        assert service.recovery.replayed.spans == 1
        await closed(service)
        assert len(ledger_signals(service)) == 4
