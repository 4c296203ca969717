"""The first start compiles every kernel; later ones find them in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from betrace.channels import ThreadRunner
from betrace.service import jit
from betrace.service.pipeline import warmup
from betrace.service.pipeline.warmup import Compilation

PROGRAM = """
import sys, trio
from betrace.channels import ThreadRunner
from betrace.service.pipeline.warmup import Compilation

async def main():
    compilation, seen = Compilation(), set()
    async def watch():
        while True:
            seen.add(compilation.progress)
            await trio.sleep(0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await compilation.run(ThreadRunner("threads", 2))
        nursery.cancel_scope.cancel()
    print(len(seen), compilation.progress, compilation.running)

trio.run(main)
"""


@pytest.mark.slow
def test_the_first_start_compiles_in_processes_and_shows_progress(tmp_path: Path) -> None:
    def start() -> list[str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        environment.pop("NUMBA_DISABLE_JIT", None)
        command = [sys.executable, "-c", PROGRAM]
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        assert ran.stderr == ""
        return ran.stdout.split()

    seen, compiled, _, total, running = start()
    several = len(os.sched_getaffinity(0)) > 1
    assert int(seen) > 10 or not several
    assert 0.9 * int(total) <= int(compiled) <= int(total) or not several
    assert running == "False"
    files = sorted(path.name for path in tmp_path.rglob("*.nbc"))
    assert ("complete" in os.listdir(tmp_path)) == several
    assert start()[:2] == ["1", "0"]
    assert sorted(path.name for path in tmp_path.rglob("*.nbc")) == files


async def test_a_part_that_cannot_be_started_is_compiled_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warmup.sys, "executable", str(tmp_path / "gone"))
    monkeypatch.setattr(jit, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(jit, "is_enabled", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    compiled = []
    monkeypatch.setattr(warmup, "warm_up", compiled.append)
    await Compilation().run(ThreadRunner("threads", 2))
    assert compiled == [list(warmup.PARTS)]
    assert "kernels cannot be compiled in a second process" in caplog.text
    assert (tmp_path / "complete").exists()
