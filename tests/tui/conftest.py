"""Tests run in UTC, and ``make check`` draws only the screens that tests look at."""

from __future__ import annotations

import time

import pytest
from textual._compositor import Compositor


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(autouse=True)
def _draw_on_demand(request, monkeypatch):
    """Omit the updates of the terminal, which no test sees, when the slow tests are omitted. They
    take a third of the time. ``screen_text`` draws the whole screen, and so do snapshots."""
    if "not slow" in request.config.option.markexpr and "snap_compare" not in request.fixturenames:
        monkeypatch.setattr(Compositor, "render_update", _nothing)


def _nothing(compositor: Compositor, **_: object) -> None:
    compositor._dirty_regions.clear()
