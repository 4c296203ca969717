"""Random conversations: the connection answers or ends, and never fails."""

from __future__ import annotations

import random

import pytest
import trio

from betrace.service.receiver.grpc import frames, methods
from betrace.service.receiver.grpc.frames import make
from tests.support.grpc_peer import prefixed, serving


def mutated(wire: bytes, choose: random.Random) -> bytes:
    data = bytearray(wire)
    for _ in range(choose.randrange(4)):
        at = choose.randrange(len(data))
        match choose.randrange(3):
            case 0:
                data[at] = choose.randrange(256)
            case 1:
                del data[at : at + choose.randrange(20)]
            case 2:
                data[at:at] = choose.randbytes(choose.randrange(20))
        data = data or bytearray(b"\x00")
    return bytes(data)


def noise(choose: random.Random) -> bytes:
    """A frame of any type with any flags."""
    payload = choose.randbytes(choose.choice([0, 1, 4, 5, 6, 8, 40]))
    return make(choose.randrange(12), choose.randrange(256), choose.randrange(5), payload)


@pytest.mark.parametrize("seed", range(60))
async def test_random_conversations(autojump_clock, caplog, seed):
    choose = random.Random(seed)
    async with serving() as s:
        try:
            for _ in range(10):
                stream = s.peer.h2.get_next_available_stream_id()
                path = choose.choice([methods.EXPORT, methods.CHECK, methods.WATCH, "/x/Y"])
                s.peer.h2.send_headers(stream, s.peer.head(path))
                message = prefixed(choose.randbytes(choose.randrange(300)))
                s.peer.h2.send_data(stream, message, end_stream=True)
                wire = s.peer.h2.data_to_send()
                if choose.random() < 0.4:
                    wire = mutated(wire, choose)
                if choose.random() < 0.3:
                    wire += noise(choose)
                while wire:
                    size = choose.randrange(1, 400)
                    await s.peer.send_raw(wire[:size])
                    wire = wire[size:]
                    await trio.sleep(choose.choice([0, 0, 0.5]))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


@pytest.mark.parametrize("seed", range(20))
async def test_random_bytes(autojump_clock, caplog, seed):
    choose = random.Random(seed)
    async with serving(start=False) as s:
        start = choose.choice([b"", frames.PREFACE])
        await s.peer.send_raw(start + choose.randbytes(choose.randrange(1, 200)))
        await trio.sleep(1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text
