"""Measures a cluster whose NATS servers, nodes and load generator share this machine.

``python -m perf.cluster PART`` with the parts ``edge`` (an edge alone), ``roles`` (CPU of all roles
next to the embedded service), ``scale`` (partitions and nodes), and ``times`` (signals, failures
and moves, at three replicas). CPU is that of each process, in user and system mode; times depend on
how busy the machine is, which is reported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from perf.cluster import edge, roles, times
from perf.report import output

Json = dict[str, Any]

PARTS: dict[str, tuple[Callable[[argparse.Namespace], Json], Callable[[Json], str]]] = {
    "edge": (edge.measure, edge.show),
    "roles": (roles.measure_roles, roles.show_roles),
    "scale": (roles.measure_scale, roles.show_scale),
    "times": (times.measure, times.show),
}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--spans", type=int, default=512, help="spans a request")
    parser.add_argument("--secs", type=float, default=8)
    parser.add_argument("--warm-up", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of roles and scale")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--partitions", type=int, default=16)
    parser.add_argument("--probes", type=int, default=100, help="signals that are timed")
    parser.add_argument("--faults", type=int, default=3, help="kills and moves of each kind")
    parser.add_argument("--only", nargs="+", choices=times.KINDS, default=list(times.KINDS))
    parser.add_argument("--profile", action="store_true", help="edge: also functions by CPU")
    options = parser.parse_args(given)
    for part in options.parts:
        measure, show = PARTS[part]
        facts = output.machine()
        found = measure(options)
        facts["load_average_after"] = round(os.getloadavg()[0], 2)
        text = f"{output.describe(facts)}; load average {facts['load_average_after']} after.\n\n"
        text += show(found)
        print(text)
        values = {"machine": facts, "options": vars(options), "found": found}
        output.say_saved(f"cluster-{part}", values, text)


if __name__ == "__main__":
    main()
