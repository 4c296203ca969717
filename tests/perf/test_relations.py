"""The curves of rules that relate spans, from tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import relations
from perf.report import output


def test_a_tiny_run_has_every_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "OUT", tmp_path)
    monkeypatch.setattr(output, "PICTURES", tmp_path)
    monkeypatch.setattr(relations, "GROUP", 2)
    spread = output.spread([1.25])
    found = {"ratio": spread, "old_us": spread, "relational_us": spread}
    monkeypatch.setattr(relations, "whole_service", lambda repeats, seconds: found)
    relations.main(["--repeats", "1", "--most", "1000", "--spans-max", "500"])
    text = (tmp_path / "relations.md").read_text()
    assert "1.25 times as much. Floor of 1.5: reached." in text
    rows = [line for line in text.splitlines() if line.startswith("| 1")]
    assert [row.split("|")[-2].strip() for row in rows][-3:] == ["yes", "yes", "no"]
    for name in ("share", "memory", "time"):
        assert (tmp_path / f"relations-{name}.svg").read_text().startswith("<svg")
    values = output.saved("relations")
    assert values is not None
    shares = [each["candidates"] for each in values["shares"]]
    assert shares == sorted(shares)
    assert shares[-1] > 0.3
