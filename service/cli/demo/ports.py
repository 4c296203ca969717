"""Ports for servers that must know theirs before they start."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux gives to clients and to listeners without a fixed port: one of those
# may be taken between this choice and the start of the server.
_FIRST, _LAST = 15_000, 32_000


def free_port() -> int:
    """An unused port of loopback."""
    choose = random.Random()  # the global one may be seeded
    for _ in range(1000):
        port = choose.randint(_FIRST, _LAST)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError("no port is free")


def free_ports(number: int) -> list[int]:
    """Different unused ports of loopback."""
    found: set[int] = set()
    while len(found) < number:
        found.add(free_port())
    return list(found)
