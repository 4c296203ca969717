"""Runs every program once with tiny sizes, with its output in a temporary directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from perf import (
    bench,
    bench_queries,
    beside,
    cachehits,
    curves,
    flamegraph,
    load,
    memory,
    overload,
    soak,
    summary,
)
from perf.lib import bench_caches, rounds
from perf.report import output

Json = dict[str, Any]


class Programs:
    """Runs a program with its figures in ``out``."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def saved(self, name: str) -> Json:
        """Return the JSON that a program wrote last."""
        found: Json = json.loads((self.out / f"{name}.json").read_text())
        return found

    def text(self, name: str) -> str:
        """Return the table that a program printed last."""
        return (self.out / f"{name}.md").read_text()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """The programs with short rounds and pauses and small stores."""
    out = tmp_path_factory.mktemp("perf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "OUT", out)
        patch.setattr(output, "PICTURES", out)
        patch.setattr(summary, "REPORT", out / "REPORT.md")
        patch.setattr(output, "PICTURES_LINK", ".")
        for module in (rounds, bench):
            patch.setattr(module, "WARM_UP", 1)
            patch.setattr(module, "ROUNDS", 2)
        patch.setattr(rounds, "ROUND_SECONDS", 0.01)
        patch.setattr(bench_caches, "STORED", 2000)
        patch.setattr(bench_queries, "BATCH", 1000)
        patch.setattr(curves, "BATCHES", 20)
        patch.setattr(cachehits, "SEND_SECONDS", 0.2)
        patch.setattr(cachehits, "THINK_SECONDS", 0.1)
        patch.setattr(cachehits, "EDIT_SECONDS", 0.2)
        yield Programs(out)


@pytest.fixture(scope="session")
def loaded(tiny: Programs) -> Json:
    """A load of three tenants with some invalid requests, twice on one service."""
    given = "--spans 100 --secs 0.6 --warm-up 0.4 --repeats 2 --idle 0.3 --rules 5 --tenants 3"
    load.main([*given.split(), "--wrong=0.1", "--breaches=0.01"])
    return tiny.saved("load")


@pytest.fixture(scope="session")
def compared(tiny: Programs) -> Json:
    """One row beside the other servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "WARM_UP", 0.3)
        patch.setattr(beside, "IDLE_SECONDS", 0.3)
        beside.main(["--seconds", "0.5", "--rounds", "2", "--rows", "10000 spans/s, 100 JSON"])
    return tiny.saved("beside")


@pytest.fixture(scope="session")
def soaked(tiny: Programs) -> Json:
    """A soak of two slices, at a rate that any machine can take."""
    given = "--secs 2 --slice 1 --warm-up 0.4 --rate 10000 --rules 5 --tenants 2 --idle 0.3"
    with suppress(SystemExit):  # a few seconds are too short for equal slices
        soak.main(given.split())
    return tiny.saved("soak")


@pytest.fixture(scope="session")
def overloaded(tiny: Programs) -> Json:
    """Twice the load for a moment."""
    given = "--secs 1 --calibrate 0.6 --warm-up 0.4 --after 1.2 --idle 0.3 --rules 5"
    with suppress(SystemExit):  # a second may be too short for a refusal
        overload.main(given.split())
    return tiny.saved("overload")


@pytest.fixture(scope="session")
def remembered(tiny: Programs) -> Json:
    """Two cycles, and one tenant in a separate process."""
    memory.main(["--cycles", "2", "--only", "cycles", *list(memory.CASES)[:1]])
    return tiny.saved("memory")


@pytest.fixture(scope="session")
def cached(tiny: Programs) -> Json:
    """A short use of the caches."""
    cachehits.main(["--secs", "2", "--tenants", "3", "--users", "3", "--rules", "2"])
    return tiny.saved("cachehits")


@pytest.fixture(scope="session")
def benched(tiny: Programs) -> Json:
    """Every benchmark, with a few calls of each."""
    bench.main(["--rate", "2000", "--probes", "1", "--warm-up", "0.2"])
    return tiny.saved("bench")


@pytest.fixture(scope="session")
def queried(tiny: Programs) -> Json:
    """The API's queries of a small tenant."""
    bench_queries.main(["--traces", "2000", "--signals", "200", "--repeats", "1"])
    return tiny.saved("queries")


@pytest.fixture(scope="session")
def curved(tiny: Programs, loaded: Json) -> Json:
    """Two points of each curve. The tenants' curve reuses the figures of ``loaded``."""
    row = loaded["rows"]["100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "measure", lambda options, spans: (row, []))
        given = "--repeats 1 --most-spans 100 --most-open 3000 --most-rules 30"
        curves.main([*given.split(), *["--many", "5", "2100", "--tenants", "1", "3"]])
    return tiny.saved("curves")


@pytest.fixture(scope="session")
def sampled(tiny: Programs) -> Json:
    """The flame graph and the functions; skipped if sampling is not permitted."""
    try:
        flamegraph.main(["--secs", "1", "--warm-up", "0.3", "--rules", "5", "--rate", "20000"])
    except SystemExit as error:
        pytest.skip(str(error))
    return tiny.saved("flamegraph")
