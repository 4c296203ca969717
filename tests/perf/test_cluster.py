"""``perf.cluster`` works with tiny sizes; its figures mean nothing here."""

from __future__ import annotations

import pytest

from perf.cluster import __main__ as program
from perf.report import cluster_floors
from tests.perf.conftest import Programs
from tests.support.nats_servers import MISSING, PROGRAM

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=MISSING)]

TINY = ["--secs=0.3", "--warm-up=0.2", "--connections=2", "--repeats=1", "--partitions=2"]


def test_the_roles_evaluate_all_spans_at_once_and_in_turns(tiny: Programs) -> None:
    program.main(["roles", *TINY])
    found = tiny.saved("cluster-roles")["found"]
    for regime in ("at_once", "in_turns"):
        assert found[regime]["lost"] == 0
        assert found[regime]["spans"] > 0
    assert "All roles ÷ embedded" in tiny.text("cluster-roles")


def test_the_times_of_signals_are_taken(tiny: Programs) -> None:
    program.main(["times", *TINY, "--probes", "2", "--only", "signal"])
    found = tiny.saved("cluster-times")
    assert found["found"]["signal"]["number"] == 2
    shown = {row[0]: row[4] for row in cluster_floors.rows({"cluster-times": found})}
    assert shown["last span → signal in the log"] != cluster_floors.NOT_RUN
