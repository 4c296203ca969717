"""Benchmarks of the ledgers: signals recorded by a call, safe on disk when it returns.

For TigerBeetle, where there is its program (``tigerbeetle`` on PATH or TIGERBEETLE_BIN): a server
with ``--development`` on the same machine and disk, and beside the adapter its floor, the bare
client with such transfers made beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tigerbeetle as tb

from perf.rounds import Json, Taken, rounds, timed
from perf.rows import make_signals
from service.ledger.sqlite import SqliteLedger
from service.ledger.tigerbeetle import TigerBeetleLedger, event
from service.signals import Signal
from tests.service.ledger.server import BATCH, CLUSTER, MISSING, PROGRAM, Server

COUNTS = (1, 10, 50, 128)
__all__ = ["COUNTS", "MISSING", "PROGRAM", "ledger"]


def ledger(directory: Path) -> dict[str, Json]:
    """Each ledger with batches of several sizes."""
    book = SqliteLedger(directory / "ledger.sqlite")
    found = _measured("sqlite", book.record, 0)
    book.close()
    if PROGRAM is None:
        print(f"  {MISSING}", file=sys.stderr)
        return found
    server = Server(directory)
    server.start()
    try:
        return found | _tigerbeetle(server, directory)
    finally:
        server.close()


def _tigerbeetle(server: Server, directory: Path) -> dict[str, Json]:
    journal = SqliteLedger(directory / "journal.sqlite")
    book = TigerBeetleLedger(server.address, CLUSTER, journal, BATCH)
    book.start(10)
    found = _measured("tigerbeetle", book.record, 0)
    book.close()
    client = tb.ClientSync(CLUSTER, server.address)
    found |= _measured(
        "tigerbeetle, bare client", client.create_transfers, 1 << 40, lambda s: [*map(event, s)]
    )
    client.close()
    return found


def _measured(
    name: str,
    record: Callable[[Sequence[Signal]], object] | Callable[[list[tb.Transfer]], object],
    first: int,
    prepare: Callable[[Sequence[Signal]], Sequence[object]] = lambda signals: signals,
) -> dict[str, Json]:
    found = {}
    for count in COUNTS:

        def call(count: int = count) -> Taken:
            nonlocal first
            made = prepare(make_signals(count, first))
            first += count
            return timed(lambda: record(made))  # type: ignore[arg-type]

        found[f"{name} {count}"] = rounds(count, call)
    return found
