from types import SimpleNamespace

import numpy as np
import pytest
import trio

from betrace.channels import (
    Breaker,
    BreakerOpen,
    BreakerOptions,
    BreakerTimeout,
    ThreadRunner,
    open_channel,
)
from betrace.service.pipeline.progress import InFlight
from betrace.service.pipeline.stages import evaluate
from betrace.service.pipeline.stages.evaluate import FEW_SIGNALS, EvaluateStage, JudgingStores
from betrace.service.telemetry.latencies import Latencies
from tests.support.failing_stores import Faulty, decided, due
from tests.support.virtual import run


class Evaluating:
    def __init__(self):
        self.faulty = Faulty()
        self.in_flight = InFlight()
        self.threads = ThreadRunner("evaluate", 2)
        limits = BreakerOptions(window=4, minimum_calls=4, open_for=30.0, timeout=10.0)
        self.breaker = Breaker("rule-evaluation", limits)
        self.buried = []
        self.seconds = []
        send, self.passed = open_channel("decided", 1000, lambda d: d.weight)
        self.stage = EvaluateStage(
            self.threads,
            send,
            self.in_flight,
            self._clock_ns,
            self.breaker,
            self._bury,
            self._latencies(),
            JudgingStores(
                SimpleNamespace(traces=lambda due, numbers: [], signals_of=lambda tenant, ids: {}),
                SimpleNamespace(add=lambda tenant, records: None),
            ),
        )

    def _latencies(self):
        latencies = Latencies()
        latencies.evaluation = SimpleNamespace(observe=self.seconds.append)
        return latencies

    def _clock_ns(self):
        """Called in the deciding thread, where it fails or hangs."""
        self.faulty.meet(RuntimeError("a bug"), lambda: None)
        return 5

    async def _bury(self, stage, items, error, attempts):
        self.buried += [(stage, item, type(error), attempts) for item in items]


def test_a_call_that_takes_too_long_is_abandoned_and_its_batch_buried(monkeypatch):
    monkeypatch.setattr(evaluate, "SMALL", -1)

    async def main():
        evaluating = Evaluating()
        batch = [due(1), due(2)]
        with evaluating.faulty.hanging():
            started = trio.current_time()
            await evaluating.stage.handle(batch)
            assert trio.current_time() - started == pytest.approx(10)
        assert evaluating.buried == [("rule-evaluation", item, BreakerTimeout, 1) for item in batch]
        assert evaluating.threads.statistics().abandoned == 1
        assert evaluating.passed.statistics().items_queued == 0
        evaluating.threads.close()

    run(main)


def test_while_the_breaker_is_open_batches_are_buried_at_once():
    async def main():
        evaluating = Evaluating()
        evaluating.faulty.fault = "error"
        for _ in range(4):
            with pytest.raises(RuntimeError, match="a bug"):
                await evaluating.stage.handle([due(1)])
        evaluating.faulty.fault = None
        started = trio.current_time()
        for _ in range(20):
            await evaluating.stage.handle([due(2)])
        assert trio.current_time() == started  # in virtual time
        assert [found[2:] for found in evaluating.buried] == [(BreakerOpen, 1)] * 20
        await trio.sleep(30)
        await evaluating.stage.handle([due(3)])
        assert evaluating.passed.statistics().items_queued == 1
        evaluating.threads.close()

    run(main)


def test_tickets_are_passed_on_or_returned():
    async def main():
        evaluating = Evaluating()
        closed, early = due(1), due(2, closed=False)
        for item in (closed, early):
            item.ticket = evaluating.in_flight.enter()
        await evaluating.stage.handle([closed, early])
        passed = await evaluating.passed.receive()
        assert passed.ticket == closed.ticket
        assert np.array_equal(passed.closed.rows, closed.rows)
        assert len(evaluating.in_flight) == 1  # the other had no result
        assert len(evaluating.seconds) == 1  # observed once for the batch
        assert 0 < evaluating.seconds[0] < 10
        evaluating.threads.close()

    run(main)


def test_small_batches_are_decided_without_a_thread_until_they_give_many_signals(monkeypatch):
    async def main():
        evaluating = Evaluating()
        stage, threads = evaluating.stage, evaluating.threads
        found = []

        def decide(batch):
            return [(decided(*found), len(each)) for each in batch]

        async def calls(*batch):
            before = threads.statistics().calls
            await stage.handle(list(batch))
            return threads.statistics().calls - before

        async def mark(found):  # would look for missing parents in a thread
            pass

        monkeypatch.setattr(stage, "_decide", decide)
        monkeypatch.setattr(stage._incomplete, "mark", mark)
        small = evaluate.SMALL // len(due().rules.rules)
        assert await calls(due(*range(small))) == 0
        assert await calls(due(*range(small)), due(1)) == 1  # together they are more
        found[:] = range(FEW_SIGNALS + 1)
        assert await calls(due(1)) == 0
        assert await calls(due(2)) == 1
        found.clear()
        assert await calls(due(3)) == 1
        assert await calls(due(4)) == 0
        threads.close()

    run(main)
