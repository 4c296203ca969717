"""Debian's Chromium, driven by Playwright, and what its pages must never do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import pytest

WIDTHS = (375, 1600)
SCHEMES = ("light", "dark")
WAIT_MS = 60_000  # tests share the machine
_ARGUMENTS = ["--no-sandbox", "--no-proxy-server", "--disable-gpu"]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window; skips the test without Playwright or Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(
    browser: Any, width: int = 1600, scheme: str = "light", **options: Any
) -> Iterator[Any]:
    """A page in a fresh profile. Fails if a page runs foreign script, breaks its own security
    policy, or has an error."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        reduced_motion="reduce",
        **options,
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    faults: list[str] = []
    page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on(
        "console",
        lambda message: (
            faults.append(f"console: {message.text} {message.location}")
            if message.type == "error"
            else None
        ),
    )
    try:
        yield page
        assert faults == []
    finally:
        context.close()


def accessibility(page: Any) -> list[str]:
    """What axe-core finds that is serious or critical, with the elements."""
    package = pytest.importorskip("axe_playwright_python")
    page.evaluate(files(package).joinpath("axe.min.js").read_text())
    found = page.evaluate("() => axe.run()")
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']} {json.dumps(node['any'])[:300]}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def fits(page: Any) -> bool:
    """Whether the page is no wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))
