"""Tables and heads of reports, and the report without runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from perf import everything, soak, summary
from perf.report import cluster_floors, floors, output


def test_a_table_is_aligned_markdown() -> None:
    assert output.table(["", "µs"], [["decode", 1], ["a long name", "22"]]) == "\n".join(
        [
            "|             | µs |",
            "|-------------|----|",
            "| decode      | 1  |",
            "| a long name | 22 |",
        ]
    )


def test_a_spread_is_median_least_and_greatest() -> None:
    found = output.spread([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}
    assert output.shown(found, 1) == "2.0 (1.0–3.0)"
    assert output.shown(output.spread([1234.56]), 1) == "1,234.6"


def test_the_description_mentions_a_busy_machine() -> None:
    facts = output.machine()
    quiet = output.describe(facts | {"load_average_before": 0.1, "cores": 2})
    assert "busy" not in quiet
    assert f"Python {facts['python']}" in quiet
    assert f"numba {facts['versions']['numba']}" in quiet
    assert "machine busy: load average 1.9" in output.describe(
        facts | {"load_average_before": 1.9, "cores": 2}
    )


def test_figures_are_saved_with_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "OUT", tmp_path / "out")
    assert output.saved("x") is None
    output.say_saved("x", {"µs": 1}, "a table")
    assert output.saved("x") == {"µs": 1}
    assert (tmp_path / "out" / "x.md").read_text() == "a table\n"
    assert capsys.readouterr().out.strip().endswith("x.json")


def test_a_report_without_runs_lists_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "OUT", tmp_path)
    monkeypatch.setattr(summary, "REPORT", tmp_path / "REPORT.md")
    summary.main([])
    written = (tmp_path / "REPORT.md").read_text()
    not_run = len(floors.FLOORS) + len(cluster_floors.ROWS)
    assert written.count(f"| {floors.NOT_RUN} ") == not_run
    for command in ("curves", "soak", "overload", "bench", "memory", "cachehits", "queries"):
        assert f"Not run: `make {command}`." in written


def test_failed_checks_are_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "OUT", tmp_path)
    monkeypatch.setattr(summary, "REPORT", tmp_path / "REPORT.md")
    (tmp_path / "load.json").write_text(json.dumps({"rows": {}, "problems": ["lost 3 spans"]}))
    (tmp_path / "load.md").write_text("the table\n")
    summary.main([])
    assert "the table\n\nChecks failed: lost 3 spans." in (tmp_path / "REPORT.md").read_text()


def test_the_last_minute_may_be_better_than_the_first_not_worse() -> None:
    first = {"spans_per_second": 100, "cpu_us_per_span": 5.0, "p99_ms": 10.0, "rss_mb": 400.0}
    better = {"spans_per_second": 150, "cpu_us_per_span": 2.0, "p99_ms": 1.0, "rss_mb": 300.0}
    assert all(soak.judge([first, better])["good"].values())
    worse = {"spans_per_second": 89, "cpu_us_per_span": 5.6, "p99_ms": 11.1, "rss_mb": 441.0}
    assert not any(soak.judge([first, worse])["good"].values())
    edge = {"spans_per_second": 90, "cpu_us_per_span": 5.5, "p99_ms": 11.0, "rss_mb": 440.0}
    assert all(soak.judge([first, edge])["good"].values())


def test_the_page_has_every_program_and_every_target_of_make() -> None:
    page = (output.ROOT / "docs" / "performance.md").read_text()
    makefile = (output.ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (load .*)$", makefile, re.MULTILINE)
    assert all(f"| `make {target}` |" in page for target in targets.split())
    programs = {
        path.stem
        for path in (output.ROOT / "perf").glob("*.py")
        if "\ndef main(" in path.read_text() and path.stem != "generator"
    }
    named = {"bench_queries": "queries", "everything": "report"}
    said = set(re.findall(r"`make (\w+)`|`python -m perf\.(\w+)`", page))
    assert {named.get(program, program) for program in programs} <= {a or b for a, b in said}


def test_a_tiny_run_may_miss_its_floors_but_not_lose_a_span(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    assert not everything._worked(path)
    path.write_text(json.dumps({"problems": ["accepted 2 spans but evaluated 1"]}))
    assert not everything._worked(path)
    path.write_text(json.dumps({"problems": []}))
    assert everything._worked(path)
