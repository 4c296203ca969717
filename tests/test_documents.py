"""What the documents say agrees with the repository: links, paths and examples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from betrace.service.config.load import load
from betrace.service.rules.parse import parse
from betrace.service.rules.units import unit_warnings, warnings
from betrace.service.rules.yaml_file import load_text
from betrace.service.traces.example_runs import check_examples

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A file that is named with its folder. Records of decisions also name files that were deleted.
SOURCE = re.compile(r"`((?:service|channels|tui|tests|grafana|perf|deploy|docs)/[\w/]+\.\w+)`")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]+)")
DELETED = {"channels/shutdown.py"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    assert [link for link in LINK.findall(prose) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = set(SOURCE.findall(page.read_text())) - DELETED
    named -= {file for file in named if file.startswith("perf/out/")}  # results of runs
    assert sorted(file for file in named if not (ROOT / file).exists()) == []


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/rules.md"])
def test_rules_that_are_shown_are_valid(page: str) -> None:
    text = (ROOT / page).read_text()
    files = [code for kind, code in FENCE.findall(text) if kind == "yaml" and "rules:" in code]
    assert files
    for code in files:
        rules = load_text(code, page)
        assert rules
        assert check_examples(rules, page) == unit_warnings(rules, page) == []


def conditions(page: str) -> list[str]:
    """The conditions in blocks of the kind ``rule``, one in a paragraph or one in each line, and in
    the last column of tables whose last column is called rule."""
    found: list[str] = []
    for kind, code in FENCE.findall(page):
        for paragraph in code.strip().split("\n\n") if kind == "rule" else ():
            one = paragraph.count("\n") == 0 or paragraph.startswith("for each")
            found += [paragraph] if one else paragraph.split("\n")
    for table in re.findall(r"^\|[^\n]*\| rule \|\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE):
        cells = [line.rstrip(" |").rpartition(" | ")[2] for line in table.splitlines()]
        assert all(cell.startswith("`") and cell.endswith("`") for cell in cells)
        found += [cell.strip("`") for cell in cells]
    return found


def test_conditions_that_are_shown_are_valid() -> None:
    found = conditions((ROOT / "docs/rules.md").read_text())
    assert len(found) > 45
    for condition in found:
        parse(condition)
        assert warnings(condition) == []


@pytest.mark.parametrize("page", [p for p in PAGES if "```toml" in p.read_text()], ids=name)
def test_settings_that_are_shown_are_valid(page: Path, tmp_path: Path) -> None:
    for kind, code in FENCE.findall(page.read_text()):
        if kind == "toml":
            file = tmp_path / "config.toml"
            file.write_text(code)
            assert load(file)
