"""Random and mutated bytes sent to the ingestion listener: it answers or closes, never fails, never
hangs, and serves the next client. ``BETRACE_EXAMPLES=10000`` is the long run."""

from __future__ import annotations

import logging
import re
from itertools import pairwise

import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from betrace.service.receiver.refusals import REASONS
from tests.service.receiver.test_http1 import mutated
from tests.support.examples import examples
from tests.support.ingest_servers import chunk, listening, post

LIMITS = {
    "head_timeout_seconds": 0.08,
    "body_timeout_seconds": 0.08,
    "keep_alive_seconds": 0.08,
    "max_body_bytes": 2000,
}
GET = b"GET /v1/traces HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = post(b"", "Transfer-Encoding: chunked") + chunk(b"abc") + b"0\r\nA: b\r\n\r\n"
EXPECTING = post(b"abcdef", "Expect: 100-continue", "Connection: close")
UPGRADE = post(b"abc", "Connection: upgrade", "Upgrade: h2c")
TOO_LARGE = post(bytes(3000)) + GET
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z ]+\r\n")
KNOWN = {100, 200, 400, 404, 405, 408, 413, 415, 431, 503, 505}

requests = mutated(post(b"abc") * 3, GET + post(b"x"), CHUNKED + GET, EXPECTING, UPGRADE, TOO_LARGE)


def answers(received: bytes) -> list[int]:
    """The status of each response in ``received``, which contains whole responses only."""
    found = []
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        assert end, head
        status = STATUS.match(head + b"\r\n")
        assert status, head
        found.append(int(status[1]))
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if length:
            assert len(received) >= int(length[1]), (head, received)
            received = received[int(length[1]) :]
    return found


async def talk(server, pieces: list[bytes]) -> bytes:
    """Send pieces and read everything until the server closes, which must be soon."""
    client = await server.connect()
    received = b""

    async def read():
        nonlocal received
        try:
            while part := await client.stream.receive_some():
                received += part
        except trio.BrokenResourceError:
            pass  # reset: the server did not read the rest

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            try:
                for piece in pieces:
                    await client.send(piece)
                    await trio.sleep(0)
            except trio.BrokenResourceError:
                pass
    await client.stream.aclose()
    server.clients.clear()
    return received


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


# All examples are drawn first and sent at once, because each lasts until a time limit.
conversations = st.lists(
    st.tuples(
        st.one_of(requests, st.binary(max_size=200)), st.lists(st.integers(0, 500), max_size=3)
    ),
    min_size=20,
    max_size=20,
)


@settings(
    max_examples=examples(10),
    phases=[Phase.explicit, Phase.generate],
)
@given(conversations)
def test_the_listener_survives_any_input(talks):
    async def main():
        logged = []
        handler = logging.Handler()
        handler.emit = logged.append
        logging.getLogger("service.http").addHandler(handler)
        try:
            async with listening(**LIMITS) as server:

                async def one(data, cuts):
                    for status in answers(await talk(server, split(data, cuts))):
                        assert status in KNOWN

                async with trio.open_nursery() as nursery:
                    for data, cuts in talks:
                        nursery.start_soon(one, data, cuts)
                client = await server.connect()
                await client.send(post(b"sound"))
                assert (await client.response())[0] == 200
                assert server.bodies[-1] == b"sound"
                assert set(server.admission.refusals.requests) == set(REASONS)
        finally:
            logging.getLogger("service.http").removeHandler(handler)
        assert [record.getMessage() for record in logged] == []

    trio.run(main)
