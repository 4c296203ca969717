"""Counts samples of a program's stacks by thread and function, from py-spy's raw format.

A line contains the thread, the frames of a stack from the outermost to the innermost, joined by
``;``, then a space and the number of samples. py-spy leaves out threads that it knows to be idle,
but not every wait. So a stack that ends in a function of ``WAITS`` does not count, and the CPU that
the system reports for a thread is distributed over the thread's samples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from perf.lib.threads import MAIN, SYSTEM_NAME
from perf.report import output

MOST = 20  # rows of the table
MAIN_THREAD = "MainThread"  # Python's name for it
# The functions in which the service's threads wait for work.
WAITS = {
    ("ThreadRunner._serve", "channels/threads.py"),
    ("EpollIOManager.get_events", "trio/_core/_io_epoll.py"),
    ("Condition.wait", "threading.py"),
    ("Event.wait", "threading.py"),
}
_THREAD = re.compile(r"thread \(\w+\): (?P<name>.*?)(-\d+)?$")
_FRAME = re.compile(r"(?P<function>.*) \((?P<file>.*?)(:\d+)?\)$")

Json = dict[str, Any]
Place = tuple[str, str, str]  # thread, function, file


def functions(raw: str, cpu: Mapping[str, float]) -> Json:
    """Return each function's share of the CPU by thread: its own (``self``, including C and
    compiled kernels that it calls) and with everything it calls (``total``); the largest own share
    first.

    ``cpu`` has each thread's share of the process's CPU, by name
    (:func:`perf.lib.threads.between`). ``unseen`` is the share of threads without samples.
    """
    seen: Counter[str] = Counter()
    own: Counter[Place] = Counter()
    whole: Counter[Place] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        first, *frames = stack.split(";")
        named = _THREAD.match(first)
        if not count.isdigit() or not named or not frames or _place(frames[-1]) in WAITS:
            continue
        name = MAIN if named["name"] == MAIN_THREAD else named["name"][:SYSTEM_NAME]
        if name not in cpu:
            continue
        seen[name] += int(count)
        places = [(name, *_place(frame)) for frame in frames]
        own[places[-1]] += int(count)
        whole.update(dict.fromkeys(places, int(count)))
    order = sorted(
        whole, key=lambda at: (-own[at] * cpu[at[0]] / seen[at[0]], -whole[at] / seen[at[0]])
    )
    return {
        "samples": seen.total(),
        "unseen": round(sum(share for name, share in cpu.items() if name not in seen), 4),
        "functions": [
            {
                "thread": at[0],
                "function": at[1],
                "file": at[2],
                "self": round(own[at] / seen[at[0]] * cpu[at[0]], 4),
                "total": round(whole[at] / seen[at[0]] * cpu[at[0]], 4),
            }
            for at in order
        ],
    }


def _place(frame: str) -> tuple[str, str]:
    found = _FRAME.match(frame)
    return (found["function"], found["file"]) if found else (frame, "")


def table(found: Json, most: int = MOST) -> str:
    """Format the functions with the largest own shares as a table."""
    rows: Iterable[tuple[str, ...]] = (
        (
            f"`{each['function']}` {each['file']}",
            each["thread"],
            f"{each['self']:.1%}",
            f"{each['total']:.1%}",
        )
        for each in found["functions"][:most]
    )
    return output.table(["function", "thread", "itself", "with what it calls"], rows)


def said(found: Json, most: int = 3) -> str:
    """Format the functions with the largest own shares as a line."""
    return ", ".join(
        f"{each['function']} ({each['thread']}) {each['self']:.0%}"
        for each in found["functions"][:most]
    )
