"""The load generator's counts when a server refuses, closes, stalls or is unreachable."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from perf.generator import Generator, Load, Result
from perf.lib.workload import Shape, make_bodies

SHAPE = Shape(spans=5, spans_per_trace=5, breaches=0.0)
Answer = Callable[[socket.socket, int], None]  # on a connection, to the request of that number


def read_request(connection: socket.socket) -> bool:
    """Return whether there was another request."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = connection.recv(65536)
        if not data:
            return False
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return True


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """A server with one connection at a time that handles each request with ``answer``."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            number = 0
            with suppress(OSError):
                while True:
                    with closing(listener.accept()[0]) as connection, suppress(OSError):
                        while read_request(connection):
                            answer(connection, number)
                            number += 1

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)
    assert not thread.is_alive()


def say(status: int, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\n%bContent-Length: 2\r\n\r\n{}" % (status, more)


def run(url: str, seconds: float = 0.4, **more: float) -> Result:
    given = {"connections": 1, "warm_up": 0.0, "timeout": 0.3} | more
    return Generator(Load(url, seconds=seconds, **given), SHAPE, make_bodies(SHAPE, 4)).run()  # type: ignore[arg-type]


def test_refusals_are_counted_and_are_not_failures() -> None:
    def answer(connection: socket.socket, number: int) -> None:
        connection.sendall(say(503, b"Retry-After: 1\r\n") if number % 2 else say(429))

    with server(answer) as url:
        result = run(url)
    refused = result.statuses["429"] + result.statuses["503"]
    assert result.refused_spans == 5 * refused > 0
    assert result.retry_after == result.statuses["503"] > 0
    assert (result.failures, result.all_spans, result.all_unknown_spans) == (0, 0, 0)
    assert refused <= 5  # it waits 0.1 s after each


def test_it_honours_retry_after_if_configured() -> None:
    with server(lambda c, _: c.sendall(say(503, b"Retry-After: 9\r\n"))) as url:
        result = run(url, honour_retry_after=True)
    assert result.statuses == {"503": 1}


def test_spans_sent_without_an_answer_are_unknown() -> None:
    """The server may have accepted it, or not."""

    def answer(connection: socket.socket, number: int) -> None:
        if number % 2:
            connection.close()
        else:
            connection.sendall(say(200))

    with server(answer) as url:
        result = run(url)
    assert result.failures > 0
    # One more may have been in progress at the end.
    assert result.all_spans - 5 * result.statuses["200"] in (0, 5)
    assert result.all_unknown_spans - 5 * result.failures in (0, 5)
    assert set(result.errors) <= {"closed before it answered", "receive: ConnectionResetError"}


def test_other_statuses_are_failures_but_known() -> None:
    with server(lambda c, _: c.sendall(say(400))) as url:
        result = run(url)
    assert result.errors == {"status 400": result.statuses["400"]}
    assert (result.all_spans, result.all_unknown_spans) == (0, 0)


def test_a_connection_closed_after_its_answer_is_reopened() -> None:
    def answer(connection: socket.socket, number: int) -> None:
        connection.sendall(say(200, b"Connection: close\r\n"))
        connection.shutdown(socket.SHUT_RDWR)

    with server(answer) as url:
        result = run(url)
    assert result.failures == 0
    assert result.requests > 1


def test_an_answer_in_pieces_is_one_answer() -> None:
    def answer(connection: socket.socket, number: int) -> None:
        whole = say(200)
        for at in range(0, len(whole), 7):
            connection.sendall(whole[at : at + 7])

    with server(answer) as url:
        result = run(url)
    assert result.failures == 0
    assert result.statuses["200"] > 1
    assert result.all_unknown_spans == 0


def test_requests_to_a_stalled_server_time_out_and_their_spans_are_unknown() -> None:
    with server(lambda *_: None) as url:
        result = run(url, seconds=0.2)
    assert (result.spans, result.all_unknown_spans) == (0, 5)


def test_an_unreachable_server_has_accepted_nothing() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        port = gone.getsockname()[1]
    result = run(f"http://127.0.0.1:{port}/v1/traces")
    assert set(result.errors) == {"connect: ConnectionRefusedError"}
    assert result.all_spans == 0


def test_latency_counts_from_when_a_request_was_due() -> None:
    """One answer takes 0.1 s. In an open loop, the ten requests due meanwhile are late as well."""

    def answer(connection: socket.socket, number: int) -> None:
        if number == 3:
            threading.Event().wait(0.1)
        connection.sendall(say(200))

    with server(answer) as url:
        result = run(url, rate=500.0)
    assert result.latency_ms["max"] >= 99
    assert result.latency_ms["p95"] >= 50
    assert result.requests == pytest.approx(0.4 * 500 / SHAPE.spans, rel=0.5)
