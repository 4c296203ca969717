"""Finds out when the requests in damaged places of the span log were received."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from betrace.service.storage.spanlog.damage import Skipped
from betrace.service.storage.spanlog.frames import FRAME_HEADER_BYTES, Header

DAY_NS = 86_400 * 10**9
LATE_NS = 3600 * 10**9
"""A segment accepts frames received this much before its day."""


class Gaps:
    """The damaged places met while reading forwards. Each is reported once the next frame shows
    until when its requests were received."""

    def __init__(self, tenant: str, report: Callable[[Skipped], None]) -> None:
        self._segment = 0
        self._day_ns = 0
        self._tenant = tenant
        self._report = report
        self._before: int | None = None  # when the last frame was received
        self._open: list[Skipped] = []

    def begin(self, segment: int, day_ns: int) -> None:
        """A segment of the day that begins then is read next."""
        self._segment, self._day_ns = segment, day_ns

    def add(self, offset: int, size: int, reason: str, lost: Sequence[Header]) -> None:
        """A damaged place of the present segment, with the headers that can be read."""
        since, until = self._day_ns - LATE_NS, self._day_ns + DAY_NS
        whole = size == sum(FRAME_HEADER_BYTES + header.length for header in lost)
        if whole:
            since, until = lost[0].received_ns, lost[-1].received_ns
        elif lost and not reason.endswith("header"):  # the first header in it can be read
            since = lost[0].received_ns
        elif self._before is not None:
            since = self._before
        self._open.append(
            Skipped(
                self._tenant,
                self._segment,
                offset,
                size,
                reason,
                sum(header.spans for header in lost),
                since,
                until,
                whole,
            )
        )

    def end(self, received_ns: int | None) -> None:
        """Report the open gaps. ``received_ns`` is when the next frame was received; None if the
        log ends here."""
        if self._open:
            for each in self._open:
                known = each.whole or received_ns is None
                self._report(each if known else replace(each, until_ns=received_ns))
            self._open.clear()
        self._before = received_ns
