"""The CPU that each thread of a process used, and its waits for a core, by thread name.

Source: Linux's /proc (proc(5): ``task/TID/stat`` for user and system time in ticks, ``schedstat``
for the nanoseconds a thread ran and was ready without a core). The service names its worker threads
after their runners (channels/threads.py). A thread started by a library inherits the name of the
thread that started it, unless the library sets one.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.report import output

TICK = 1 / os.sysconf("SC_CLK_TCK")
SYSTEM_NAME = 15  # characters of a thread's name that Linux keeps
MAIN = "trio"  # the service's first thread
OTHER = "DuckDB, Arrow"  # threads that libraries started from the main thread
ENDED = "ended meanwhile"
LEAST_SHARE = 0.005  # of the CPU; smaller threads share a row

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Used:
    """Seconds since a thread's start: running in user mode, in system mode, and waiting for a free
    core."""

    name: str
    user: float
    system: float
    waited: float


def threads(pid: int, root: Path = Path("/proc")) -> dict[int, Used]:
    """Return what the threads of a process have used, by id. Threads that end meanwhile are left
    out."""
    found = {}
    folder = root / str(pid)
    for task in (folder / "task").iterdir():
        try:
            # The name is in parentheses and may contain parentheses and spaces.
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            waited = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = rest.split()
        user, system = (int(fields[i]) * TICK for i in (11, 12))
        found[int(task.name)] = Used(name, user, system, waited)
    main = found.get(pid)
    if main is not None:
        unnamed = main.name
        for thread, used in found.items():
            if used.name == unnamed:
                name = MAIN if thread == pid else OTHER
                found[thread] = Used(name, used.user, used.system, used.waited)
    return found


def between(
    before: Mapping[int, Used], after: Mapping[int, Used], seconds: float, spans: int, cpu: float
) -> dict[str, Json]:
    """Return what each thread name used between ``before`` and ``after``, largest first, for a
    period of ``seconds`` with ``spans``. ``cpu`` is the whole process's CPU in seconds; what its
    threads do not account for was used by threads that ended."""
    total: dict[str, list[float]] = {}
    nothing = Used("", 0.0, 0.0, 0.0)
    for thread, now in after.items():
        then = before.get(thread, nothing)
        sums = total.setdefault(now.name, [0.0, 0.0, 0.0])
        for i, key in enumerate(("user", "system", "waited")):
            sums[i] += max(0.0, getattr(now, key) - getattr(then, key))
    rest = cpu - sum(user + system for user, system, _ in total.values())
    if rest > LEAST_SHARE * cpu:
        total[ENDED] = [rest, 0.0, 0.0]
    used = {name: user + system for name, (user, system, _) in total.items()}
    return {
        name: {
            "cores": round(used[name] / seconds, 4),
            "system_cores": round(total[name][1] / seconds, 4),
            "us_per_span": round(1e6 * used[name] / max(1, spans), 4),
            "share": round(used[name] / cpu, 4) if cpu else 0.0,
            "waited_share": round(total[name][2] / seconds, 4),
        }
        for name in sorted(used, key=lambda name: -used[name])
    }


def median(runs: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Return the medians of several runs, largest first. A thread missing in a run counts as 0."""
    names = {name: None for run in runs for name in run}
    keys = ("cores", "system_cores", "us_per_span", "share", "waited_share")
    found = {
        name: {
            key: round(statistics.median(run.get(name, {}).get(key, 0.0) for run in runs), 4)
            for key in keys
        }
        for name in names
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["share"]))


def table(found: Mapping[str, Json]) -> str:
    """Format the threads as a Markdown table; those with little CPU share a row."""
    shown = {name: used for name, used in found.items() if used["share"] >= LEAST_SHARE}
    few = [used for name, used in found.items() if name not in shown]
    rows = [_row(name, [used]) for name, used in shown.items()]
    if few:
        rows.append(_row(f"{len(few)} more", few))
    head = ["thread of the service", "CPU, µs a span", "share", "cores", "in the system", "waited"]
    return output.table(head, rows)


def _row(name: str, of: Iterable[Json]) -> list[str]:
    sums = dict.fromkeys(("us_per_span", "share", "cores", "system_cores", "waited_share"), 0.0)
    for used in of:
        for key in sums:
            sums[key] += used[key]
    system = sums["system_cores"] / sums["cores"] if sums["cores"] else 0.0
    return [
        name,
        f"{sums['us_per_span']:.2f}",
        f"{sums['share']:.0%}",
        f"{sums['cores']:.2f}",
        f"{system:.0%}",
        f"{sums['waited_share']:.0%}",
    ]


NOTE = (
    "*In the system*: fraction of its CPU used by the kernel (sockets, files). *Waited*: fraction "
    "of the time in which it was ready to run but had no core."
)
