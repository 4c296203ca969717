"""Functions by CPU from py-spy's stacks."""

from __future__ import annotations

import pytest

from perf.lib import stacks

CPU = {"trio": 0.6, "fallback-duckdb": 0.3, "jemalloc_bg_thd": 0.1}
RAW = """\
thread (0x1F): MainThread;run (trio/_core/_run.py:2532);read (service/a.py:3) 6
thread (0x1F): MainThread;run (trio/_core/_run.py:2540);read (service/a.py:9);parse (b.py:1) 2
thread (0x1F): MainThread;run (trio/_core/_run.py:1);EpollIOManager.get_events (trio/_core/_io_epoll.py:242) 90
thread (77): fallback-duckdb-1;ThreadRunner._serve (channels/threads.py:246) 500
thread (77): fallback-duckdb-1;ThreadRunner._serve (channels/threads.py:250);write (c.py:1) 3
thread (78): fallback-duckdb-2;ThreadRunner._serve (channels/threads.py:250);<lambda> (c.py:2) 1
thread (99): unknown-1;f (d.py:1) 1000

not a stack
"""  # noqa: E501


def test_samples_share_their_threads_cpu_and_waits_do_not_count() -> None:
    found = stacks.functions(RAW, CPU)
    assert found["samples"] == 12
    assert found["unseen"] == pytest.approx(0.1)
    own = {(f["thread"], f["function"]): f["self"] for f in found["functions"]}
    total = {(f["thread"], f["function"]): f["total"] for f in found["functions"]}
    assert own["trio", "read"] == pytest.approx(0.6 * 6 / 8)
    assert own["trio", "parse"] == pytest.approx(0.6 * 2 / 8)
    assert (own["trio", "run"], total["trio", "run"]) == (0, pytest.approx(0.6))
    assert total["trio", "read"] == pytest.approx(0.6)
    assert own["fallback-duckdb", "write"] == pytest.approx(0.3 * 3 / 4)
    assert total["fallback-duckdb", "ThreadRunner._serve"] == pytest.approx(0.3)
    assert sum(own.values()) == pytest.approx(0.9)
    assert found["functions"][0]["function"] == "read"  # most of its own first


def test_recursion_counts_once() -> None:
    raw = "thread (1): MainThread;f (a.py:1);f (a.py:1);f (a.py:2) 5\n"
    (only,) = stacks.functions(raw, {"trio": 1.0})["functions"]
    assert (only["self"], only["total"]) == (1.0, 1.0)


def test_no_samples() -> None:
    assert stacks.functions("", {}) == {"samples": 0, "unseen": 0, "functions": []}


def test_the_table_and_the_line() -> None:
    found = stacks.functions(RAW, CPU)
    table = stacks.table(found, most=2).split("\n")
    assert len(table) == 4
    assert "`read` service/a.py" in table[2]
    assert "45.0%" in table[2]
    assert "60.0%" in table[2]
    assert stacks.said(found, 2) == "read (trio) 45%, write (fallback-duckdb) 22%"
