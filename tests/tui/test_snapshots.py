"""The appearance of each screen at the smallest size, and of some at larger ones.

After an intended change, run ``pytest tests/tui/test_snapshots.py --snapshot-update``, review the
changes in ``__snapshots__``, and regenerate the pictures of the docs
(``python -m tests.tui.screenshots``).
"""

from __future__ import annotations

import pytest

from betrace.tui import connection
from tests.support.tui_fake import FakeApi
from tests.support.tui_scenes import SCENES, prepare

SMALL, COMMON, WIDE = (80, 24), (120, 40), (200, 50)
RARE = ("breaker", "cache", "stage", "dead-letter", "tenant-delete", "read-only", "rule-new")
RARE += ("rule-test", "pipeline-paused", "signals-by-rule", "acknowledge")
"""Scenes that only ``make test`` compares. Other tests read their text."""

SCREENS = [
    pytest.param(name, SMALL, id=f"{name}-80x24", marks=[pytest.mark.slow] if name in RARE else [])
    for name in SCENES
]
SCREENS += [
    pytest.param(name, COMMON, id=f"{name}-120x40", marks=pytest.mark.slow)
    for name, scene in SCENES.items()
    if scene.both
]
SCREENS += [
    pytest.param(name, WIDE, id=f"{name}-200x50", marks=pytest.mark.slow)
    for name, scene in SCENES.items()
    if scene.wide
]


@pytest.fixture(autouse=True)
def _no_second_try(monkeypatch):
    """Keep a lost connection lost, always with the same seconds to the next retry."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 600.0)


@pytest.mark.parametrize(("name", "size"), SCREENS)
def test_a_screen_looks_as_before(name, size, snap_compare):
    scene = SCENES[name]
    api = FakeApi()
    app = api.app(scene.read_only, cluster=scene.cluster)
    assert snap_compare(
        app, terminal_size=size, run_before=lambda pilot: prepare(pilot, api, scene)
    )
