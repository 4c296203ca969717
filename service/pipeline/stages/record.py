"""storage-write: signals go to the ledger, which is the record of them, then on to the projection.

The ledger is written as soon as there is something to write: what arrives during one write becomes
the next batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson
import trio
from cachetools import LRUCache

from betrace.channels import BreakerTimeout, SendChannel, ThreadTimeout, TransientError
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.pipeline.fallback import Fallback, GuardedStore
from betrace.service.signals import Signal
from betrace.service.storage.ledger.base import Ledger, LedgerError, RefusedError, transfer
from betrace.service.telemetry.latencies import Latencies
from betrace.service.traces.verdicts import Decided

STAGE = "storage-write"
MOST_UNSURE = 100_000  # signals of failed calls that are remembered


@dataclass(slots=True)
class RecordCounts:
    """What the stage has done, in signals."""

    new: int = 0
    """New in the ledger."""
    repeated: int = 0
    """Already in the ledger."""


class RecordStage:
    """The handler of the storage-write stage.

    ``recorded`` is called with the signals that are new in the ledger. Signals that the ledger does
    not accept now go to its fallback files; signals that it can never accept become dead letters.
    """

    def __init__(
        self,
        ledger: GuardedStore[Ledger],
        batch_signals: int,
        onward: SendChannel[Decided],
        recorded: Callable[[list[Signal]], None],
        latencies: Latencies,
        clock_ns: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._batch = batch_signals
        self._onward = onward
        self._recorded = recorded
        self._latencies = latencies
        self._clock_ns = clock_ns
        self._unsure: LRUCache[str, None] = LRUCache(MOST_UNSURE)  # of calls with unknown outcome
        self.counts = RecordCounts()
        self.fallback: Fallback[Signal] = Fallback(
            "ledger",
            ledger.files,
            _encode,
            _decode,
            self._write_back,
            latencies.fallback.labels("ledger").observe,
        )

    async def handle(self, batch: list[Decided]) -> None:
        """Make the signals of a batch durable, then pass it on to the projection."""
        signals = [signal for decided in batch for signal in decided.signals]
        for start in range(0, len(signals), self._batch):
            chunk = signals[start : start + self._batch]
            await self.fallback.store_or_put(chunk, self._record_all, (LedgerError, OSError))
        now = self._clock_ns()
        for decided in batch:
            if decided.signals:
                seconds = (now - decided.due_ns) / 1e9
                self._latencies.end_to_end.observe(seconds, decided.signals[0].trace_id)
        await self._onward.send_each(batch)

    async def _record_all(self, chunk: Sequence[Signal]) -> None:
        """Record signals. Raises :exc:`PoisonError` if the ledger can never accept one of them."""
        refused = await self._record(list(chunk))
        if refused:
            raise PoisonError("; ".join(f"signal {s.id}: {reason}" for s, reason in refused))

    async def _write_back(self, signals: list[Signal]) -> None:
        for start in range(0, len(signals), self._batch):
            try:
                refused = await self._record(signals[start : start + self._batch])
            except LedgerError as error:
                raise TransientError(str(error)) from error
            for signal, reason in refused:
                poison = PoisonError(f"signal {signal.id}: {reason}")
                await self._ledger.bury(STAGE, [Decided(signal.tenant, [signal], None)], poison, 1)

    async def _record(self, chunk: list[Signal]) -> list[tuple[Signal, str]]:
        """Record signals; returns those that the ledger can never accept, with the reason.

        A failed call may have recorded signals, so signals of failed calls that are found in the
        ledger later count as new.
        """
        try:
            new, refused = await self._ledger.breaker.call(self._call, chunk)
        except (BreakerTimeout, ThreadTimeout, LedgerError, OSError):
            self._unsure.update(dict.fromkeys(signal.id for signal in chunk))
            raise
        unsure = self._unsure
        fresh = [
            signal
            for signal, is_new in zip(chunk, new, strict=True)
            if (signal.id in unsure and unsure.pop(signal.id, True) is None) or is_new
        ]
        self.counts.new += len(fresh)
        self.counts.repeated += len(chunk) - len(fresh) - len(refused)
        if fresh:
            self._recorded(fresh)
        return [(chunk[index], reason) for index, reason in refused.items()]

    async def _call(self, chunk: list[Signal]) -> tuple[list[bool], dict[int, str]]:
        started, began = time.perf_counter(), time.monotonic()
        try:
            outcome = await self._ledger.threads.run(self._try, chunk, abandon_on_cancel=True)
        except trio.Cancelled:
            self._ledger.store.replace(began)
            raise
        self._latencies.ledger.observe(time.perf_counter() - started)
        return outcome

    def _try(self, chunk: list[Signal]) -> tuple[list[bool], dict[int, str]]:
        try:
            return self._ledger.store.record(chunk), {}
        except RefusedError as error:  # the ledger works
            return error.new, error.refused
        except LedgerError as error:
            if not error.transient:  # the cause is the ledger, or one of the signals
                for signal in chunk:
                    _encode(signal)
            raise


def _encode(signal: Signal) -> bytes:
    """The signal as JSON. Raises :exc:`PoisonError` if no ledger can accept it."""
    try:
        transfer(signal)
        return orjson.dumps(signal)
    except (LedgerError, orjson.JSONEncodeError) as error:
        raise PoisonError(f"signal {signal.id}: {error}") from error


def _decode(line: bytes) -> Signal:
    signal = Signal.from_json(orjson.loads(line))
    try:
        _encode(signal)
    except PoisonError as error:
        raise ValueError(str(error)) from error
    return signal
