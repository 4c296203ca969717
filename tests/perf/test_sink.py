"""The server that does nothing with what the generator of an attack sends."""

from __future__ import annotations

import http.client
import socket
import time
from urllib.parse import urlsplit

from perf.lib.attackers import Attack
from perf.lib.sink import Sink


def test_each_request_is_answered_and_the_oldest_connections_are_closed():
    with Sink(most=2, answer_bytes=5) as sink:
        address = urlsplit(sink.ingest)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        for body in (b"", b"abc", b"x" * 200_000):
            connection.request("POST", "/v1/traces", body)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, bytes(5))
        slow = [socket.create_connection((address.hostname, address.port)) for _ in range(2)]
        for one in slow:
            one.settimeout(60)
            one.sendall(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc")
        assert connection.sock is None or connection.sock.recv(10) == b""
        connection.close()
        for one in slow:
            one.close()


def test_the_generator_keeps_its_pace():
    acts: list[float] = []

    class Nowhere:
        ingest = api = "http://127.0.0.1:1"

    attack = Attack(Nowhere(), pace=50)

    def act() -> None:
        acts.append(time.monotonic())
        if len(acts) == 5:
            attack.over.set()

    attack.together(1, act)
    assert attack.acts == 5
    assert acts[-1] - acts[0] >= 4 * 0.02 - 0.005
