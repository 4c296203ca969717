import pytest
import trio

from betrace.channels import BreakerState
from betrace.service.pipeline.breakers import PoisonError
from betrace.service.pipeline.progress import InFlight
from betrace.service.pipeline.stages.pacing import CommitPace
from betrace.service.pipeline.stages.project import ProjectStage
from betrace.service.storage.fallback_files import FallbackFiles
from betrace.service.telemetry.latencies import Latencies
from tests.support.failing_stores import FaultyStore, decided
from tests.support.store_stages import LIMITS, StageOverStore, ids
from tests.support.virtual import run


class Projecting(StageOverStore):
    """A projection stage over a faulty store."""

    def __init__(self, directory, store, limits=LIMITS):
        super().__init__("duckdb", store, FallbackFiles(directory, 1 << 20), limits)
        self.store = store
        self.in_flight = InFlight()
        self.stage = ProjectStage(self.guarded, self.in_flight, CommitPace(1.0), Latencies())
        self.fallback = self.stage.fallback

    async def _bury(self, stage, items, error, attempts):
        self.buried += [(stage, item, str(error)) for item in items]


def traces(*numbers):
    return [(number + 1).to_bytes(16, "big") for number in numbers]


def test_rows_that_duckdb_refuses_are_written_back_in_order(tmp_path):
    async def main():
        projecting = Projecting(tmp_path, FaultyStore())
        projecting.store.fault = "error"
        async with projecting.running():
            ticket = projecting.in_flight.enter()
            await projecting.stage.handle([decided(1, 2, ticket=ticket)])
            assert len(projecting.in_flight) == 0  # durable in the files
            await projecting.stage.handle([decided(3, tenant="b"), decided(4, tenant="b")])
            await projecting.stage.handle([decided(5)])
            projecting.store.fault = None
            await projecting.settled()
            assert projecting.store.traces == {"acme": traces(1, 2, 5), "b": traces(3, 4)}
            assert projecting.store.signals["acme"] == ids(1, 2, 5)
            await projecting.stage.handle([decided(6)])
            await projecting.settled()  # it may have been one trial call too many
            assert projecting.store.traces["acme"] == traces(1, 2, 5, 6)

    run(main)


def test_rows_that_can_never_be_written_are_poison(tmp_path):
    async def main():
        projecting = Projecting(tmp_path, FaultyStore())
        projecting.store.fault, projecting.store.transient = "error", False
        async with projecting.running():
            for _ in range(6):
                with pytest.raises(PoisonError, match="DuckDB is away"):
                    await projecting.stage.handle([decided(1)])
            assert projecting.breaker.state is BreakerState.CLOSED

    run(main)


def test_poison_in_the_files_is_buried_and_the_rest_is_written(tmp_path):
    async def main():
        projecting = Projecting(tmp_path, FaultyStore())
        projecting.store.poison = traces(2)[0].hex()
        projecting.breaker.force_open()
        async with projecting.running():
            await projecting.stage.handle([decided(1), decided(2), decided(3)])
            projecting.breaker.reset()
            await projecting.settled()
            assert projecting.store.traces["acme"] == traces(1, 3)
            ((stage, item, error),) = projecting.buried
            assert stage == "projection"
            assert [s.id for s in item.signals] == ids(2)
            assert "does not fit" in error

    run(main)


def test_rows_are_found_after_a_restart(tmp_path):
    async def main():
        store = FaultyStore()
        store.fault = "error"
        projecting = Projecting(tmp_path, store)
        async with projecting.running():
            await projecting.stage.handle([decided(1, 2)])
        store.fault = None
        again = Projecting(tmp_path, store)
        async with again.running():
            await again.settled()
        assert store.traces["acme"] == traces(1, 2)

    run(main)


def test_rows_of_concurrent_batches_are_all_counted(tmp_path):
    async def main():
        projecting = Projecting(tmp_path, FaultyStore())
        async with projecting.running():
            async with trio.open_nursery() as nursery:
                for tenant in ("a", "b"):
                    nursery.start_soon(projecting.stage.handle, [decided(1, tenant=tenant)])
            assert projecting.stage.rows == 4  # a signal and a trace each

    run(main)


def test_a_hanging_duckdb_call_is_abandoned(tmp_path):
    async def main():
        projecting = Projecting(tmp_path, FaultyStore())
        async with projecting.running():
            with projecting.store.hanging():
                started = trio.current_time()
                await projecting.stage.handle([decided(1)])
                assert trio.current_time() - started == pytest.approx(5)
                assert projecting.fallback.pending
            await projecting.settled()
            assert set(projecting.store.traces["acme"]) == set(traces(1))

    run(main)


def test_full_files_make_the_projection_wait_until_duckdb_is_back(tmp_path):
    async def main():
        projecting = Projecting(tmp_path, FaultyStore())
        projecting.files._max_bytes = 10
        projecting.store.script = iter(["error"] * 3)
        async with projecting.running():
            started = trio.current_time()
            await projecting.stage.handle([decided(1)])
            assert trio.current_time() - started >= 3
            assert projecting.store.traces["acme"] == traces(1)

    run(main)
