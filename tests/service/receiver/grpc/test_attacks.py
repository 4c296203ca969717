"""Known attacks on HTTP/2, each with what bounds it; docs/security.md has the figures."""

from __future__ import annotations

import struct
import tracemalloc

import h2.events
import pytest
import trio
from h2.errors import ErrorCodes

from betrace.service.pipeline.request import Done
from betrace.service.receiver.grpc import frames
from betrace.service.receiver.grpc.budget import BURST, COSTS, PER_SECOND
from betrace.service.receiver.grpc.connection import MAX_UNSENT_BYTES, WINDOW_BYTES
from betrace.service.receiver.grpc.outbound import MAX_STREAMS
from tests.support.grpc_peer import prefixed, serving
from tests.support.http_requests import ScriptedQueue

CALM = ErrorCodes.ENHANCE_YOUR_CALM
PROTOCOL = ErrorCodes.PROTOCOL_ERROR

PING = frames.make(frames.PING, 0, 0, bytes(8))
SETTINGS = frames.make(frames.SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535))


async def flood(s, frame: bytes, count: int) -> None:
    """Send ``frame`` ``count`` times, as far as the server takes it."""
    try:
        for start in range(0, count, 100):
            await s.peer.send_raw(frame * min(100, count - start))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (PING, frames.PING),
        (SETTINGS, frames.SETTINGS),
        (frames.make(frames.PRIORITY, 0, 1, bytes(5)), frames.PRIORITY),
        (frames.window_update(0, 1), frames.WINDOW_UPDATE),
        (frames.make(0xBE, 0, 0, b"?"), 0xBE),
    ],
)
async def test_floods_of_control_frames(autojump_clock, frame, kind):
    allowed = int(BURST / COSTS.get(kind, 1.0))
    async with serving() as s:
        await flood(s, frame, allowed - 50)  # what goes with the beginning costs as well
        assert (await s.peer.ask(b"spans")).status == 0
        await flood(s, frame, allowed + 100)
        code, text = await s.peer.goaway()
        assert code == CALM
        assert text.startswith("too")


async def test_a_ping_flood_is_told_as_grpc_has_it(autojump_clock):
    async with serving() as s:
        await flood(s, PING, 200)
        assert await s.peer.goaway() == (CALM, "too_many_pings")


async def test_pings_at_the_allowed_pace(autojump_clock):
    async with serving(keep_alive_seconds=3600) as s:
        for _ in range(500):
            await s.peer.send_raw(PING)
            await trio.sleep(COSTS[frames.PING] / PER_SECOND * 1.1)
        assert (await s.peer.ask(b"spans")).status == 0


async def test_empty_data_frames(autojump_clock):
    async with serving() as s:
        stream = await s.peer.begin()
        await flood(s, frames.make(frames.DATA, 0, stream), 2000)
        assert (await s.peer.goaway())[0] == CALM


async def test_a_message_in_single_bytes(autojump_clock):
    async with serving() as s:
        stream = await s.peer.begin()
        await s.peer.send_data(stream, prefixed(bytes(100_000))[:5])
        await flood(s, frames.make(frames.DATA, 0, stream, b"x"), 2000)
        assert (await s.peer.goaway())[0] == CALM


async def test_rapid_reset(autojump_clock):
    """CVE-2023-44487: streams that are opened and cancelled at once."""
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        for _ in range(300):
            stream = await s.peer.call(b"spans")
            s.peer.h2.reset_stream(stream, ErrorCodes.CANCEL)
            await s.peer.flush()
        assert (await s.peer.goaway())[0] == CALM
        assert len(s.bodies) <= BURST / COSTS[frames.RST_STREAM] + 1
        for request in queue.taken:
            request.reply.set(Done(1))


async def test_resets_that_the_server_is_made_to_send(autojump_clock):
    """ "MadeYouReset", CVE-2025-8671: the client breaks rules so that the server resets streams."""
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        for _ in range(300):
            stream = await s.peer.call(b"spans")
            await s.peer.send_raw(frames.window_update(stream, (1 << 31) - 1))  # it overflows
            s.peer.h2.reset_stream(stream)
            s.peer.h2.clear_outbound_data_buffer()
        assert (await s.peer.goaway())[0] == CALM
        assert len(s.bodies) <= BURST / COSTS[frames.RST_STREAM] + 1
        for request in queue.taken:
            request.reply.set(Done(1))


async def test_too_many_streams(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        streams = [await s.peer.begin() for _ in range(MAX_STREAMS)]
        s.peer.h2.remote_settings.max_concurrent_streams = 1000
        s.peer.h2.remote_settings.acknowledge()
        await s.peer.begin()
        await s.peer.goaway()
    assert len(streams) == MAX_STREAMS
    assert not s.bodies


async def test_a_continuation_flood(autojump_clock):
    """CVE-2024-27316: a header block that has no end."""
    async with serving() as s:
        await s.peer.send_raw(frames.make(frames.HEADERS, 0, 1, b"\x82"))
        await flood(s, frames.make(frames.CONTINUATION, 0, 1, bytes(0)), 100)
        code, text = await s.peer.goaway()
        assert code == CALM
        assert "CONTINUATION" in text


async def test_a_large_header_block(autojump_clock):
    async with serving() as s:
        await s.peer.send_raw(frames.make(frames.HEADERS, 0, 1, bytes(16_000)))
        await flood(s, frames.make(frames.CONTINUATION, 0, 1, bytes(16_000)), 10)
        assert (await s.peer.goaway())[0] == CALM


async def test_a_frame_that_announces_16_mib_of_headers(autojump_clock):
    async with serving() as s:
        await s.peer.send_raw(b"\xff\xff\xff\x01\x04\x00\x00\x00\x01")
        assert (await s.peer.goaway())[0] == CALM


async def test_an_hpack_bomb(autojump_clock):
    """CVE-2016-6581: one large entry of the table, named thousands of times."""
    async with serving() as s:
        await s.peer.begin(x="y" * 4000)
        await trio.testing.wait_all_tasks_blocked()
        bomb = b"\xbe" * 16_000  # the newest entry, 64 MB of headers
        tracemalloc.start()
        await s.peer.send_raw(frames.make(frames.HEADERS, frames.END_HEADERS, 3, bomb))
        code, _ = await s.peer.goaway()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert code == CALM
        assert peak < 4_000_000


@pytest.mark.parametrize("block", [b"\xff" * 20, b"\x3f\xff\xff\xff\x7f", b"\x80", b"\x40\x05a"])
async def test_header_blocks_that_are_not_hpack(autojump_clock, block):
    async with serving() as s:
        await s.peer.send_raw(frames.make(frames.HEADERS, frames.END_HEADERS, 1, block))
        assert (await s.peer.goaway())[0] in (PROTOCOL, ErrorCodes.COMPRESSION_ERROR)


async def test_a_client_that_reads_nothing(autojump_clock):
    """Answers to pings pile up on our side only up to a bound; then the connection ends."""
    async with serving(start=False) as s:
        near = s.connection._transport.stream
        blocked = trio.Event()

        async def send_all(data):
            blocked.set()
            await trio.sleep_forever()

        s.peer.h2.initiate_connection()
        await s.peer.flush()
        near.send_all = send_all
        s.connection._transport.send = send_all
        start = trio.current_time()
        await flood(s, PING, 90)
        await s.done.wait()
        assert blocked.is_set()
        assert trio.current_time() - start < 15
        assert s.connection._out.size < MAX_UNSENT_BYTES


async def test_zero_windows_hold_no_more_than_their_answers(autojump_clock):
    async with serving() as s:
        s.peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await s.peer.flush()
        streams = [await s.peer.call(b"spans") for _ in range(MAX_STREAMS)]
        start = trio.current_time()
        answers = [await s.peer.answer(stream) for stream in streams]
        assert {answer.reset for answer in answers} == {ErrorCodes.CANCEL}
        assert trio.current_time() - start < 15
        assert s.admission.buffered_bytes == 0


async def test_more_data_than_the_window(autojump_clock):
    queue = ScriptedQueue(outcome=None)
    async with serving(queue) as s:
        await s.peer.call(bytes(WINDOW_BYTES))
        stream = await s.peer.begin()
        size = WINDOW_BYTES
        await s.peer.send_raw(frames.make(frames.DATA, 0, stream, prefixed(bytes(size))))
        assert (await s.peer.goaway())[0] == ErrorCodes.FLOW_CONTROL_ERROR
        queue.taken[0].reply.set(Done(1))


async def test_many_announce_much_and_send_little(autojump_clock):
    async with serving() as s:
        streams = [await s.peer.begin() for _ in range(50)]
        for stream in streams:
            await s.peer.send_data(stream, prefixed(bytes(19_000_000))[:8])
        await trio.testing.wait_all_tasks_blocked()
        assert s.admission.buffered_bytes == 150


@pytest.mark.parametrize(
    "sent",
    [
        frames.make(frames.DATA, 0, 0, b"x"),
        frames.make(frames.DATA, 0, 7, b"x"),
        frames.make(frames.DATA, 0, 2, b"x"),
        frames.make(frames.PING, 0, 1, bytes(8)),
        frames.make(frames.PING, 0, 0, bytes(7)),
        frames.make(frames.CONTINUATION, 4, 1, b"\x82"),
        frames.make(frames.PUSH_PROMISE, 4, 1, bytes(4)),
        frames.make(frames.HEADERS, 0, 1, b"\x82") + PING,
        frames.make(frames.HEADERS, 4, 2, b"\x82"),
        frames.make(frames.SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31)),
        frames.make(frames.SETTINGS, 0, 0, b"odd"),
        frames.window_update(0, 0),
        frames.make(frames.DATA, frames.PADDED, 1, b""),
        frames.make(frames.DATA, frames.PADDED, 1, b"\x09123"),
    ],
)
async def test_frames_that_break_the_protocol_end_the_connection(autojump_clock, sent):
    async with serving() as s:
        await s.peer.send_raw(sent)
        code, _ = await s.peer.goaway()
        assert code != ErrorCodes.NO_ERROR
