"""CPU by thread: readings of real threads in /proc, and their sums."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import trio

from betrace.channels import ThreadRunner
from perf.lib import threads
from perf.lib.threads import ENDED, MAIN, OTHER, Used


async def test_a_busy_thread_of_a_runner_is_found_by_its_name() -> None:
    def busy() -> None:
        end = time.thread_time() + 0.15
        while time.thread_time() < end:
            pass

    with ThreadRunner("perf-busy", 1) as runner:
        await runner.run(int)
        before, cpu, began = threads.threads(os.getpid()), time.process_time(), time.monotonic()
        await runner.run(busy)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        found = threads.between(before, threads.threads(os.getpid()), seconds, 1000, cpu)
    used = found["perf-busy"]
    assert 0.1 / seconds <= used["cores"] <= 0.25 / seconds
    assert used["us_per_span"] == pytest.approx(1e6 * used["cores"] * seconds / 1000, rel=0.01)


def task(root: Path, thread: int, name: str, user: int, system: int, waited: int) -> None:
    folder = root / "7" / "task" / str(thread)
    folder.mkdir(parents=True)
    times = f"{user} {system}"
    (folder / "stat").write_text(f"{thread} ({name}) S 1 7 7 0 -1 64 1 2 3 4 {times} 0 0 20 0\n")
    (folder / "schedstat").write_text(f"123 {waited} 9\n")


def test_names_with_brackets_and_the_first_thread(tmp_path: Path) -> None:
    task(tmp_path, 7, "python", 100, 50, 10**9)
    task(tmp_path, 8, "python", 1, 0, 0)
    task(tmp_path, 9, "a) (b c", 2, 3, 5 * 10**8)
    (tmp_path / "7" / "task" / "10").mkdir()  # one that has just ended
    found = threads.threads(7, tmp_path)
    tick = threads.TICK
    assert found == {
        7: Used(MAIN, 100 * tick, 50 * tick, 1.0),
        8: Used(OTHER, tick, 0.0, 0.0),
        9: Used("a) (b c", 2 * tick, 3 * tick, 0.5),
    }


def test_threads_of_a_name_are_summed_and_the_rest_is_of_ended_threads() -> None:
    before = {1: Used("trio", 1.0, 0.5, 0.0), 2: Used("duckdb", 2.0, 0.0, 1.0)}
    after = {
        1: Used("trio", 2.0, 1.5, 0.0),
        2: Used("duckdb", 2.5, 0.0, 3.0),
        3: Used("duckdb", 0.5, 0.0, 0.0),  # a new one
    }
    found = threads.between(before, after, seconds=10.0, spans=1_000_000, cpu=4.0)
    assert list(found) == ["trio", "duckdb", ENDED]
    assert found["trio"] == {
        "cores": 0.2,
        "system_cores": 0.1,
        "us_per_span": 2.0,
        "share": 0.5,
        "waited_share": 0.0,
    }
    assert found["duckdb"]["us_per_span"] == 1.0
    assert found["duckdb"]["waited_share"] == 0.2
    assert found[ENDED]["share"] == 0.25
    assert sum(used["share"] for used in found.values()) == pytest.approx(1.0)


def test_medians_of_runs_and_the_table() -> None:
    def run(trio_us: float) -> dict[str, threads.Json]:
        used = {"cores": 0.5, "system_cores": 0.1, "share": 0.9, "waited_share": 0.3}
        few = {"cores": 0.0, "system_cores": 0.0, "share": 0.001, "waited_share": 0.0}
        return {
            "trio": {**used, "us_per_span": trio_us},
            "sync": {**few, "us_per_span": 0.01},
            "audit": {**few, "us_per_span": 0.02},
        }

    found = threads.median([run(1.0), run(3.0), run(2.0), {}, run(9.0)])
    assert found["trio"]["us_per_span"] == 2.0
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in threads.table(found).split("\n")]
    assert rows[2] == ["trio", "2.00", "90%", "0.50", "20%", "30%"]
    assert rows[3][:2] == ["2 more", "0.03"]
    assert len(rows) == 4


async def test_a_thread_that_ended_is_left_out() -> None:
    ended = threading.Thread(target=int)
    ended.start()
    thread = ended.native_id
    ended.join()
    with trio.fail_after(60):
        while thread in threads.threads(os.getpid()):
            await trio.sleep(0.01)
