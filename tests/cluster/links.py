"""TCP connections that a test can cut: a relay between a node and a NATS server.

While a link is cut, its connections stay open and nothing passes, as if a cable was pulled; new
connections are accepted and get no answer.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

BLOCK = 1 << 16


class Link:
    """A loopback port whose connections go to ``target`` (host, port)."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Let nothing pass."""
        self._flowing.clear()

    def heal(self) -> None:
        """Let everything pass again. Bytes that were held are delivered, as after a pulled cable is
        plugged in again."""
        self._flowing.set()

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        self._flowing.set()
        with self._lock:
            ends = [self._listener, *self._sockets]
        for each in ends:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._flowing.wait()
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._sockets |= {near, far}
        for pair in ((near, far), (far, near)):
            threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(BLOCK):
                self._flowing.wait()
                sink.sendall(data)
        with self._lock:
            self._sockets -= {source, sink}
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
