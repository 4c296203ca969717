"""How each screen looks, at the smallest size and at a usual one.

After a wanted change: ``pytest tests/tui/test_snapshots.py --snapshot-update``, look at what
changed in ``__snapshots__``, and make the pictures of the docs anew
(``python -m tests.tui.screenshots``).
"""

from __future__ import annotations

import pytest

from betrace.tui import connection
from tests.support.tui_fake import FakeApi
from tests.support.tui_scenes import SCENES, prepare

SMALL, USUAL = (80, 24), (120, 40)
LOOKS = [(name, SMALL) for name in SCENES]
LOOKS += [(name, USUAL) for name, scene in SCENES.items() if scene.both]


@pytest.fixture(autouse=True)
def _no_second_try(monkeypatch):
    """What is lost stays so, with the same seconds to the next try."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 600.0)


@pytest.mark.parametrize(
    ("name", "size"), LOOKS, ids=[f"{name}-{width}x{height}" for name, (width, height) in LOOKS]
)
def test_looks(name, size, snap_compare):
    scene = SCENES[name]
    api = FakeApi()
    app = api.app(scene.read_only)
    assert snap_compare(
        app, terminal_size=size, run_before=lambda pilot: prepare(pilot, api, scene)
    )
