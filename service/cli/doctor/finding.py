"""The finding of a check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "failed"]
OK: Status = "ok"
NOTE: Status = "note"
"""Worth knowing, but nothing is wrong."""
WARNING: Status = "warning"
FAILED: Status = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: what was checked, its status, and, unless that is ok, what to do."""

    check: str
    status: Status
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


def size(number: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
