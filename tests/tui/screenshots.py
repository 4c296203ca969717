"""Generates the pictures of docs/tui.md from the fake API: ``python -m tests.tui.screenshots``."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

from tests.support.tui_fake import FakeApi
from tests.support.tui_scenes import SCENES, prepare

PICTURES = Path(__file__).parents[2] / "docs" / "tui"
SIZE = (100, 30)

SHOWN = (
    *("overview-overloaded", "pipeline", "breakers", "breaker", "confirm", "caches"),
    *("signals", "signal", "rules", "rule-edit", "dead-letters", "tenants", "system", "cluster"),
)

_FONT = re.compile(r",?\s*url\([^)]*\)(?: format\([^)]*\))?")
"""The URL of a web font. Without it, viewers use a local font."""


async def picture(name: str) -> str:
    """A scene as SVG."""
    scene, api = SCENES[name], FakeApi()
    app = api.app(scene.read_only, cluster=scene.cluster)
    async with app.run_test(size=SIZE) as pilot:
        await prepare(pilot, api, scene)
        found = app.export_screenshot(title="betrace tui")
    await app.client.close()
    return _FONT.sub("", found)


def main() -> None:
    os.environ["TZ"] = "UTC"
    time.tzset()
    PICTURES.mkdir(exist_ok=True)
    for name in SHOWN:
        (PICTURES / f"{name}.svg").write_text(asyncio.run(picture(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
