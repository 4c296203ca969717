"""Errors of the span log."""

from __future__ import annotations


class LogWriteError(OSError):
    """Frames could not be written; none of them is in the log."""


class FrameMissing(LookupError):  # noqa: N818
    """No segment contains this position; it may have been released."""


class FrameCorrupt(ValueError):  # noqa: N818
    """There is no whole frame at this position."""
