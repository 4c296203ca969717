"""Benchmarks of the ledgers: signals recorded by a call, safe on disk when it returns.

For TigerBeetle, where there is its program (``tigerbeetle`` on PATH or TIGERBEETLE_BIN): a server
with ``--development`` on the same machine and disk, and beside the adapter its floor, the bare
client with such transfers made beforehand. A server that is called again and again without a pause
spends part of its time on sorting what it was told before; so batches of 128 are also sent ``PACE``
times a second, many times what breaches at 100 000 spans/s need.
"""

from __future__ import annotations

import sys
import time
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
PACE = 20
PACED_ROUND_SECONDS = 3.0
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
    if name != "sqlite":

        def paced() -> Taken:
            time.sleep(1 / PACE)
            return call()

        found[f"{name} 128, {PACE} a second"] = rounds(128, paced, PACED_ROUND_SECONDS)
    return found
