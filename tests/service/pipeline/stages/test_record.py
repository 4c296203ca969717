import time
from collections import Counter

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.channels import BreakerState, open_channel
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.pipeline.stages.record import RecordStage
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.telemetry.latencies import Latencies
from tests.support.examples import examples
from tests.support.failing_stores import FaultyLedger, decided, signal
from tests.support.store_stages import LIMITS, StageOverStore, ids
from tests.support.virtual import run


class Storing(StageOverStore):
    """A storage-write stage over a faulty ledger; what it passes on is in ``passed``."""

    def __init__(self, directory, ledger, max_bytes=1 << 20, limits=LIMITS):
        files = FallbackFiles(directory, max_bytes, file_bytes=2000)
        super().__init__("ledger", ledger, files, limits)
        self.ledger = ledger
        self.stored = []
        send, self.passed = open_channel("rows", 100_000, lambda d: d.weight)
        self.stage = RecordStage(
            self.guarded, 5, send, self.stored.extend, Latencies(), time.time_ns
        )
        self.counts = self.stage.counts
        self.fallback = self.stage.fallback

    async def _bury(self, stage, items, error, attempts):
        self.buried.append((stage, [s.id for each in items for s in each.signals], str(error)))


def test_a_working_ledger_gets_the_signals_and_the_files_nothing(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        async with storing.running():
            await storing.stage.handle([decided(1, 2), decided(3)])
            assert storing.ledger.order == ids(1, 2, 3)
            assert [s.id for s in storing.stored] == ids(1, 2, 3)
            assert storing.passed.statistics().items_queued == 2
            assert not storing.fallback.pending
            await storing.stage.handle([decided(2)])
            assert (storing.counts.new, storing.counts.repeated) == (3, 1)

    run(main)


@pytest.mark.parametrize("fault", ["error", "late error"])
@pytest.mark.parametrize("transient", [True, False])
def test_signals_that_a_failing_ledger_refuses_are_written_back_later(tmp_path, fault, transient):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        storing.ledger.fault, storing.ledger.transient = fault, transient
        async with storing.running():
            await storing.stage.handle([decided(1, 2)])
            assert storing.fallback.pending
            assert storing.passed.statistics().items_queued == 1  # durable, so it is passed on
            storing.ledger.fault = None
            await storing.settled()
            assert storing.ledger.order == ids(1, 2)
            assert [s.id for s in storing.stored] == ids(1, 2)
            assert (storing.counts.new, storing.counts.repeated) == (2, 0)
            assert storing.fallback.last_error is None
            assert list(tmp_path.iterdir()) == []

    run(main)


def test_the_ledger_is_not_called_while_the_breaker_is_open(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        storing.ledger.fault = "error"
        async with storing.running():
            for number in range(3):
                await storing.stage.handle([decided(number)])
            while storing.breaker.state is not BreakerState.OPEN:
                await trio.sleep(0.5)
            calls, opened = storing.ledger.calls, trio.current_time()
            await storing.stage.handle([decided(4)])
            await trio.sleep_until(opened + 14)
            assert storing.ledger.calls == calls
            storing.ledger.fault = None
            await storing.settled()
            assert storing.ledger.order == ids(0, 1, 2, 4)
            # Trial calls close it; one chunk was enough for everything pending, so one more is due.
            await storing.stage.handle([decided(5)])
            assert storing.breaker.state is BreakerState.CLOSED

    run(main)


def test_new_signals_go_behind_pending_ones(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        storing.ledger.script = iter(["error", "error"])
        async with storing.running():
            await storing.stage.handle([decided(1)])
            await storing.stage.handle([decided(2)])
            assert storing.ledger.order == []
            await storing.settled()
            assert storing.ledger.order == ids(1, 2)
            await storing.stage.handle([decided(3)])
            assert storing.ledger.order == ids(1, 2, 3)

    run(main)


def test_a_hanging_ledger_call_is_abandoned(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        async with storing.running():
            started = trio.current_time()
            with storing.ledger.hanging():
                await storing.stage.handle([decided(1)])
                assert trio.current_time() - started == pytest.approx(5)
                assert storing.threads.statistics().left_behind == 1
                assert storing.ledger.replaced == 1
                assert storing.fallback.pending
            await storing.settled()
            assert [s.id for s in storing.stored] == ids(1)  # reported once, whoever recorded it
            # The hanging call continued and recorded it too: still one.
            assert storing.ledger.new == Counter(ids(1))

    run(main)


def test_a_signal_that_the_ledger_refuses_is_poison_and_the_others_are_reported(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        storing.ledger.refused = set(ids(2))
        async with storing.running():
            with pytest.raises(PoisonError, match=f"{ids(2)[0]}: never"):
                await storing.stage.handle([decided(1, 2, 3)])
            assert [s.id for s in storing.stored] == ids(1, 3)
            assert (storing.counts.new, storing.counts.repeated) == (2, 0)
            assert not storing.fallback.pending
            assert storing.breaker.snapshot().failed == 0

    run(main)


def test_a_refused_signal_in_the_files_becomes_a_dead_letter(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        storing.ledger.refused = set(ids(2))
        storing.ledger.script = iter(["error"])
        async with storing.running():
            await storing.stage.handle([decided(1, 2, 3)])
            await storing.settled()
            assert storing.ledger.order == ids(1, 3)
            ((stage, buried, why),) = storing.buried
            assert (stage, buried) == ("storage-write", ids(2))
            assert "never" in why

    run(main)


def test_the_stage_waits_while_the_files_are_full(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger(), max_bytes=700)
        storing.ledger.fault = "error"
        async with storing.running():
            await storing.stage.handle([decided(1)])
            with trio.move_on_after(60) as waiting:
                await storing.stage.handle([decided(2, 3, 4)])
            assert waiting.cancelled_caught
            assert storing.fallback.refusals > 1
            assert storing.passed.statistics().items_queued == 1  # the second is not durable
            storing.ledger.fault = None
            await storing.stage.handle([decided(2, 3, 4)])
            await storing.settled()
            assert storing.ledger.new == Counter(ids(1, 2, 3, 4))

    run(main)


def test_when_neither_the_ledger_nor_the_files_work_the_ledger_is_tried_again(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger(), max_bytes=10)
        storing.ledger.script = iter(["error"] * 3)
        async with storing.running():
            await storing.stage.handle([decided(1)])
            assert storing.ledger.order == ids(1)
            assert storing.fallback.refusals == 3

    run(main)


def test_an_unrecordable_signal_is_poison_and_does_not_trip_the_breaker(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        bad = decided(1)
        object.__setattr__(bad.signals[0], "id", "not an id")
        async with storing.running():
            for _ in range(6):
                with pytest.raises(PoisonError, match="not 32 hex digits"):
                    await storing.stage.handle([bad])
            assert storing.breaker.state is BreakerState.CLOSED
            storing.breaker.force_open()
            with pytest.raises(PoisonError):
                await storing.stage.handle([bad])
            assert not storing.fallback.pending

    run(main)


def test_files_are_written_back_after_a_restart(tmp_path):
    async def main():
        ledger = FaultyLedger()
        ledger.fault = "error"
        storing = Storing(tmp_path, ledger)
        async with storing.running():
            for number in range(20):
                await storing.stage.handle([decided(number)])
        ledger.fault = None
        again = Storing(tmp_path, ledger)
        assert again.fallback.pending
        async with again.running():
            await again.stage.handle([decided(20)])
            await again.settled()
        assert ledger.order == ids(*range(21))
        assert list(tmp_path.iterdir()) == []

    run(main)


def test_damaged_lines_are_set_aside_and_the_rest_is_written_back(tmp_path):
    (tmp_path / "000001.jsonl").write_bytes(b'{"id": 1}\nnonsense\n[]\n')

    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        async with storing.running():
            await storing.stage.handle([decided(1)])
            await storing.settled()
            assert storing.ledger.order == ids(1)
        assert (tmp_path / "damaged.txt").read_bytes().count(b"\n") == 3
        assert storing.fallback.shown()["damaged"] == 3

    run(main)


def test_write_back_now_does_not_wait_for_the_next_try(tmp_path):
    async def main():
        storing = Storing(tmp_path, FaultyLedger())
        storing.breaker.force_open()
        async with storing.running():
            await storing.stage.handle([decided(1)])
            await trio.sleep(60)
            assert storing.ledger.calls == 0
            storing.breaker.reset()
            storing.fallback.write_back_now()
            started = trio.current_time()
            while storing.fallback.pending:
                await trio.sleep(0.01)
            assert trio.current_time() - started < 1
            assert storing.ledger.order == ids(1)

    run(main)


def test_a_bug_in_the_store_does_not_end_the_write_back(tmp_path):
    class Odd(FaultyLedger):
        odd = True

        def record(self, signals):
            if self.odd:
                raise RuntimeError("a bug")
            return super().record(signals)

    async def main():
        storing = Storing(tmp_path, Odd())
        storing.breaker.force_open()
        async with storing.running():
            await storing.stage.handle([decided(1)])
            storing.breaker.disable()
            await trio.sleep(20)
            assert "a bug" in storing.fallback.last_error
            storing.ledger.odd = False
            await storing.settled()
            assert storing.ledger.order == ids(1)

    run(main)


FAULTS = st.sampled_from([None, None, "error", "late error"])


async def cancel_after(steps, scope):
    """Cancel in the middle of the work, mostly in a thread."""
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()


@settings(max_examples=examples(25))
@given(st.lists(st.tuples(st.integers(1, 7), FAULTS, FAULTS, st.integers(0, 4)), max_size=12))
def test_every_signal_is_recorded_once_whatever_fails(tmp_path_factory, steps):
    directory = tmp_path_factory.mktemp("fallback")
    ledger = FaultyLedger()
    given = []

    async def life(todo):
        """One process, which works until it is killed; items not durable come again, as from a
        log."""
        storing = Storing(directory, ledger)
        async with storing.running(), trio.open_nursery() as killer:
            while todo:
                batch, faults, kill_after = todo[0]
                ledger.script = iter(faults)
                with trio.CancelScope() as scope:
                    if kill_after:
                        killer.start_soon(cancel_after, kill_after, scope)
                    await storing.stage.handle([batch])
                if scope.cancelled_caught:
                    todo[0] = (batch, faults, 0)
                    return
                todo.pop(0)

    async def main():
        todo, number = [], 0
        for count, *faults, kill_after in steps:
            todo.append((decided(*range(number, number + count)), faults, kill_after))
            number += count
        given.extend(s.id for batch, _, _ in todo for s in batch.signals)
        while todo:
            await life(todo)
        ledger.script = iter(())
        storing = Storing(directory, ledger)
        async with storing.running():
            await storing.settled()
        assert ledger.new == Counter(given)
        assert list(directory.iterdir()) == []

    run(main)


def test_the_real_ledger_through_an_outage(tmp_path):
    async def main():
        ledger = SqliteLedger(tmp_path / "ledger.sqlite")
        storing = Storing(tmp_path / "fallback", ledger)
        async with storing.running():
            await storing.stage.handle([decided(1)])
            storing.breaker.force_open()
            await storing.stage.handle([decided(2, 3)])
            await storing.stage.handle([decided(3, 4)])
            storing.breaker.reset()
            await storing.settled()
        assert [s.id for _, s in ledger.entries("acme")] == ids(1, 2, 3, 4)
        assert ledger.entries("acme")[1][1] == signal(2)
        assert ledger.balance("acme", "r") == 4
        assert storing.counts.repeated == 1
        ledger.close()

    run(main)
