"""The files of a tenant's span log: ``<day>/<number>.seg``, numbered in the order of writing."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from betrace.service.storage.spanlog.frames import MAX_SEGMENT
from betrace.service.storage.spanlog.gaps import DAY_NS, LATE_NS
from betrace.service.times import day_ns

_log = logging.getLogger("service.spanlog")

_NAME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}/[0-9]{8,10}\.seg")


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the log. ``day`` is the UTC day on which its frames were received."""

    number: int
    day: date
    path: Path
    bytes: int


def find_segments(directory: Path, strays: set[Path]) -> dict[int, Path]:
    """The segments in a directory by number, in order. Other files with their ending are reported
    once and added to ``strays``."""
    found: dict[int, Path] = {}
    for path in sorted(directory.glob("*/*.seg")):
        number = _segment_number(path)
        if number and number not in found:
            found[number] = path
        elif path not in strays:
            strays.add(path)
            _log.warning(
                "%s is not a segment of the span log (its name should be YYYY-MM-DD/NNNNNNNN.seg "
                "with an unused number) and is ignored: move it away",
                path,
            )
    return dict(sorted(found.items()))


def _segment_number(path: Path) -> int:
    """The number of a segment, 0 if ``path`` cannot be one."""
    if _NAME.fullmatch(f"{path.parent.name}/{path.name}") is None or not path.is_file():
        return 0
    try:
        date.fromisoformat(path.parent.name)
    except ValueError:
        return 0
    number = int(path.stem)
    return number if number <= MAX_SEGMENT else 0


def covers(day: date, since_ns: int | None, until_ns: int | None) -> bool:
    """Whether a segment of ``day`` can hold frames from that time."""
    start = day_ns(day)
    return (since_ns is None or since_ns < start + DAY_NS) and (
        until_ns is None or until_ns > start - LATE_NS
    )
