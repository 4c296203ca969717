"""Benchmarks of the ledgers: signals recorded by a call, which are on disk when it returns.

TigerBeetle is measured if its program is found (``tigerbeetle`` on PATH or TIGERBEETLE_BIN), with a
``--development`` server on the same machine and disk. Beside the adapter is its lower bound: the
bare client with prepared transfers. A server that is called without pause spends part of its time
sorting earlier transfers, so batches of 128 are also sent ``PACE`` times a second. That is many
times the rate of breaches at 100 000 spans/s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tigerbeetle as tb

from betrace.service.signals import Signal
from betrace.service.storage.ledger.packed import event
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.ledger.tigerbeetle import TigerBeetleLedger
from perf.lib.rounds import Json, Taken, rounds, timed
from perf.lib.rows import make_signals
from tests.support.tigerbeetle_server import BATCH, CLUSTER, MISSING, PROGRAM, Server

COUNTS = (1, 10, 50, 128)
PACE = 20
PACED_ROUND_SECONDS = 3.0
__all__ = ["COUNTS", "MISSING", "PROGRAM", "ledger"]


def ledger(directory: Path) -> dict[str, Json]:
    """Measure each ledger with batches of several sizes."""
    book = SqliteLedger(directory / "ledger.sqlite")
    found = _measured("sqlite", book.record, 0)
    book.close()
    if PROGRAM is None:
        print(f"  {MISSING}", file=sys.stderr)
        return found
    for name, counts, pace in (("paced", COUNTS[-1:], PACE), ("unpaced", COUNTS, 0)):
        own = directory / name
        own.mkdir()
        server = Server(own)
        server.start()
        try:
            found |= _tigerbeetle(server, own, counts, pace)
        finally:
            server.close()
    return found


def _tigerbeetle(
    server: Server, directory: Path, counts: Sequence[int], pace: float
) -> dict[str, Json]:
    """Measure the adapter, then the bare client, on a new server."""
    journal = SqliteLedger(directory / "journal.sqlite")
    book = TigerBeetleLedger(server.address, CLUSTER, journal, BATCH)
    book.start(10)
    found = _measured("tigerbeetle", book.record, 0, counts=counts, pace=pace)
    book.close()
    client = tb.ClientSync(CLUSTER, server.address)
    found |= _measured(
        "tigerbeetle, bare client",
        client.create_transfers,
        1 << 40,
        lambda s: [*map(event, s)],
        counts,
        pace,
    )
    client.close()
    return found


def _measured(
    name: str,
    record: Callable[[Sequence[Signal]], object] | Callable[[list[tb.Transfer]], object],
    first: int,
    prepare: Callable[[Sequence[Signal]], Sequence[object]] = lambda signals: signals,
    counts: Sequence[int] = COUNTS,
    pace: float = 0,
) -> dict[str, Json]:
    """Measure calls with ``count`` signals, ``pace`` a second or without pause."""
    found = {}
    for count in counts:

        def call(count: int = count) -> Taken:
            nonlocal first
            made = prepare(make_signals(count, first))
            first += count
            if pace:
                time.sleep(1 / pace)
            return timed(lambda: record(made))  # type: ignore[arg-type]

        how = f", {pace} a second" if pace else ""
        seconds = PACED_ROUND_SECONDS if pace else None
        found[f"{name} {count}{how}"] = rounds(count, call, seconds)
    return found
