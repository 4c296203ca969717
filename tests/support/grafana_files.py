"""The files in grafana/, and the metrics that they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "grafana"

Json = dict[str, Any]

_METRIC = re.compile(r"\b(?:betrace|process|python)_[a-z_]+\b")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH (Debian: prometheus)"
)


def promtool(*arguments: str, given: bytes = b"") -> str:
    """Return promtool's output; it must succeed."""
    ran = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, cwd=FOLDER, timeout=300
    )
    printed = (ran.stdout + ran.stderr).decode()
    assert ran.returncode == 0, printed
    return printed


def dashboard() -> Json:
    found: Json = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
    return found


def panels() -> Iterator[Json]:
    """Yield the panels, without rows."""
    yield from (panel for panel in dashboard()["panels"] if panel["type"] != "row")


def titles_in(row: str) -> Iterator[str]:
    """Yield the titles of a row's panels."""
    current = ""
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            current = panel["title"]
        elif current == row:
            yield panel["title"]


def queries() -> Iterator[tuple[str, str]]:
    """Yield each query with its panel's title, for all jobs and instances."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m")
            query = query.replace("$job", ".+").replace("$instance", ".+")
            assert "$" not in query.replace('"$1"', ""), query
            yield panel["title"], query


def alerts() -> list[Json]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))["groups"]
    return list(group["rules"])


def metrics_of(query: str) -> set[str]:
    """Return the metrics named in PromQL."""
    return set(_METRIC.findall(_STRING.sub('""', query)))
