"""The appearance of each screen at the smallest size and at a common one.

After an intended change, run ``pytest tests/tui/test_snapshots.py --snapshot-update``, review the
changes in ``__snapshots__``, and regenerate the pictures of the docs
(``python -m tests.tui.screenshots``).
"""

from __future__ import annotations

import pytest

from betrace.tui import connection
from tests.support.tui_fake import FakeApi
from tests.support.tui_scenes import SCENES, prepare

SMALL, COMMON = (80, 24), (120, 40)
SCREENS = [(name, SMALL) for name in SCENES]
SCREENS += [(name, COMMON) for name, scene in SCENES.items() if scene.both]


@pytest.fixture(autouse=True)
def _no_second_try(monkeypatch):
    """Keep a lost connection lost, always with the same seconds to the next retry."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 600.0)


@pytest.mark.parametrize(
    ("name", "size"), SCREENS, ids=[f"{name}-{width}x{height}" for name, (width, height) in SCREENS]
)
def test_a_screen_looks_as_before(name, size, snap_compare):
    scene = SCENES[name]
    api = FakeApi()
    app = api.app(scene.read_only)
    assert snap_compare(
        app, terminal_size=size, run_before=lambda pilot: prepare(pilot, api, scene)
    )
