"""Pages of the service in a web browser."""

from __future__ import annotations

import os
import sys

from betrace.tui.base import BaseApp


def open_page(app: BaseApp, path: str) -> None:
    """Open a page, and copy its address for terminals on other machines."""
    url = f"{app.client.url}{path}"
    app.copy_to_clipboard(url)
    if has_browser():
        app.open_url(url)
    app.notify(url, title="Address of the page, copied", markup=False)


def has_browser() -> bool:
    """Whether there is a graphical browser. A text browser would take over the terminal."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
