"""``docs/reliability.md`` and ``docs/cluster.md`` name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def named(page: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text())


RELIABILITY, CLUSTER = named("docs/reliability.md"), named("docs/cluster.md")
NAMED = list(dict.fromkeys(RELIABILITY + CLUSTER))


def test_they_name_tests() -> None:
    assert len(RELIABILITY) > 30
    assert len(CLUSTER) > 10


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_it_names_exists(file: str, name: str) -> None:
    assert re.search(rf"\b(def|class) {name}\b", (ROOT / file).read_text()), f"{file}::{name}"
