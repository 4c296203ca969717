"""The running service, when a batch fails in the middle of its folding."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from betrace.service.app.service import Service
from betrace.service.traces import folding
from betrace.service.traces.table import TraceTable
from tests.support.inprocess import active_signals, closed, running, send, settings, write_rules
from tests.support.spans import TRACE, S

RULES = {
    "all": "count(a) == 1500",  # more than the window in which repeated spans are recognized
    "late": 'count(a.where(x matches "^v")) == 1',
    "b": "when { a } always { b }",
}


@pytest.fixture
def fault(monkeypatch):
    """Comparisons in Python fail while it is not empty."""
    left: list[int] = []
    evaluate = folding.evaluate

    def fail(*args: Any) -> bool:
        if left:
            left.pop()
            raise MemoryError("says the test")
        return evaluate(*args)

    monkeypatch.setattr(folding, "evaluate", fail)
    return left


def broken(service: Service) -> set[str]:
    return {rule for _, rule in active_signals(service)}


def spans() -> list[S]:
    return [S(n, x="v1" if n == 1200 else "w") for n in range(1, 1501)]


async def test_a_redelivered_batch_counts_once(tmp_path, fault):
    write_rules(tmp_path, RULES)
    retry = {"attempts": 3, "delay_seconds": 0.01}
    async with running(settings(tmp_path, redelivery=retry)) as service:
        fault += [0, 0]
        await send(service, spans())
        await closed(service)
        assert not fault
        assert service.pipeline.open_traces.counts.folded == 1500
        assert service.pipeline.open_traces.counts.repeated == 0
        assert broken(service) == {"all", "late", "b"}
        assert service.sources.account().balance == 0


async def test_the_rest_of_a_failed_batch_stays_a_dead_letter_through_checkpoints_and_crashes(
    tmp_path, fault
):
    write_rules(tmp_path, RULES)
    retry = {"attempts": 1, "delay_seconds": 0.01, "transient_retry_seconds": 3600}
    config = settings(tmp_path, redelivery=retry)
    fault += [0] * 100_000
    async with running(config, die=True) as service:
        await send(service, spans())
        with trio.fail_after(60):
            while service.pipeline.letters.book.spans < 1500:
                await trio.sleep(0.01)
        assert await service.recovery.save()
    fault.clear()
    async with running(config) as service:
        assert service.sources.account().carried == 1500
        await send(service, [S(2000, "b")])
        await closed(service)
        assert broken(service) == {"all"}  # the comparisons are left
        await service.pipeline.letters.retry()
        with trio.fail_after(60):
            while service.pipeline.letters.book.spans:
                await trio.sleep(0.01)
        await closed(service)
        assert service.pipeline.open_traces.counts.repeated == 0
        assert broken(service) == {"all", "late"}
        assert service.sources.account().balance == 0


async def test_a_folded_batch_is_no_dead_letter_when_a_later_step_fails(tmp_path, monkeypatch):
    close = TraceTable.close
    failures: list[int] = []

    def fail(self: TraceTable, *args: Any) -> Any:
        if failures:
            failures.pop()
            raise MemoryError("says the test")
        return close(self, *args)

    monkeypatch.setattr(TraceTable, "close", fail)
    write_rules(tmp_path, RULES)
    async with running(settings(tmp_path, redelivery={"attempts": 0})) as service:
        failures += [0, 0]
        await send(service, [S(1, complete=True), S(2, trace=b"\2" * 16)])
        await closed(service)
        assert not failures
        assert service.pipeline.failed_after_folding == 2
        account = service.sources.account()
        assert (account.evaluated, account.dead_lettered, account.balance) == (2, 0, 0)
        assert active_signals(service) == {(TRACE.hex(), "b"), ((b"\2" * 16).hex(), "b")}
