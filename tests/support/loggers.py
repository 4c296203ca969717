"""Restores logging after a test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("service", "channels", "service.http.hypercorn")


@contextmanager
def restored() -> Iterator[None]:
    """Restore the root logger's handlers and all levels at the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    for name in NAMES:
        logging.getLogger(name).setLevel(logging.NOTSET)
