"""Memory: what tenants, rules and live spans hold, and that opening and closing leaves nothing.

``python -m perf.memory`` measures the resident memory of a process of its own for each case, after
the kernels are loaded (requirement F).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from perf import report
from perf.engine import TENANT
from perf.workload import Shape, make_bodies, rule_definitions
from service.otlp.wire import scan_bodies
from service.rules.compile import CompiledRules, compile_rules
from service.rules.definition import make_rule
from service.stages.evaluate import decide_due
from service.storage.duck import DuckStore
from service.storage.frames import Frame
from service.storage.spanlog import SpanLog
from service.traces.index import trace_table
from service.traces.tenant import TenantTraces
from service.warmup import warm_up

SECOND = 1_000_000_000
MB = 1e6

Json = dict[str, Any]


class _Tenants:
    """Tenants as the service holds them: compiled rules, traces, a log, a file of the query
    store."""

    def __init__(self, directory: Path, rules: int, stack: ExitStack) -> None:
        self._log = stack.enter_context(SpanLog(directory))
        self._store = stack.enter_context(DuckStore(directory, idle_close=0.0))
        self._rules = rules
        self.open: dict[str, tuple[CompiledRules, TenantTraces]] = {}

    def begin(self, tenant: str, body: bytes, spans: int) -> None:
        """Open a tenant with live spans."""
        definitions = [make_rule(d) for d in rule_definitions(self._rules)]
        rules = compile_rules(definitions, "1")
        traces = TenantTraces(tenant, rules)
        batch = scan_bodies(tenant, [body])
        frame = Frame("protobuf", "", time.time_ns(), body, spans)
        batch.positions = _positions(self._log.append(tenant, [frame]))
        traces.fold(batch, SECOND)
        self.open[tenant] = rules, traces

    def end(self, tenant: str) -> None:
        """Close it: its traces decided and stored, its file closed."""
        _, traces = self.open.pop(tenant)
        for due in traces.close_due(10 * SECOND, SECOND):
            decided = decide_due(due, time.time_ns())
            self._store.write(tenant, signals=decided.signals, traces=trace_table(due))
        self._store.sweep()


def _positions(given: list[int]) -> Any:
    import numpy as np

    return np.array(given, np.int64)


def _rss() -> float:
    """Resident memory in bytes, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss)


def _body(spans: int) -> bytes:
    return bytes(make_bodies(Shape(spans=spans, breaches=0.01), 1)[0].data)


def cycles(directory: Path) -> Json:
    """A tenant opened, used for 100 spans and closed, 1000 times."""
    with ExitStack() as stack:
        tenants = _Tenants(directory, 100, stack)
        body = _body(100)
        tenants.begin("warm-up", body, 100)
        tenants.end("warm-up")
        start = _rss()
        steps = []
        for i in range(1000):
            name = f"tenant-{i:04d}"
            tenants.begin(name, body, 100)
            tenants.end(name)
            if (i + 1) % 100 == 0:
                steps.append(round((_rss() - start) / MB, 1))
        return {"growth_mb": steps[-1], "growth_mb_by_100": steps, "floor_mb": 100}


def one_tenant(directory: Path) -> Json:
    """One tenant with 100 rules and 1000 live spans."""
    with ExitStack() as stack:
        tenants = _Tenants(directory, 100, stack)
        body = _body(1000)
        start = _rss()
        tenants.begin(TENANT, body, 1000)
        held = tenants.open[TENANT][1].nbytes
        return {"growth_mb": round((_rss() - start) / MB, 1), "traces_bytes": held, "floor_mb": 50}


def many_tenants(directory: Path) -> Json:
    """500 tenants with 50 rules and 100 live spans each."""
    with ExitStack() as stack:
        tenants = _Tenants(directory, 50, stack)
        body = _body(100)
        start = _rss()
        for i in range(500):
            tenants.begin(f"tenant-{i:04d}", body, 100)
        growth = _rss() - start
        return {
            "growth_mb": round(growth / MB, 1),
            "kb_per_tenant": round(growth / 500 / 1000, 1),
            "floor_mb": None,
        }


CASES: dict[str, Callable[[Path], Json]] = {
    "1000 open/close cycles": cycles,
    "one tenant, 100 rules, 1000 live spans": one_tenant,
    "500 tenants, 50 rules and 100 live spans each": many_tenants,
}


def _measure(name: str, queue: Any) -> None:
    warm_up()
    with tempfile.TemporaryDirectory(prefix="betrace-perf-", dir=os.environ.get("PERF_TMP")) as d:
        queue.put(CASES[name](Path(d)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    facts = report.machine()
    context = multiprocessing.get_context("spawn")
    found: Json = {}
    for name in CASES:
        queue = context.Queue()
        process = context.Process(target=_measure, args=(name, queue))
        process.start()
        found[name] = queue.get(timeout=600)
        process.join()
    rows = []
    for name, values in found.items():
        floor = values["floor_mb"]
        verdict = "–" if floor is None else "reached" if values["growth_mb"] < floor else "MISSED"
        shown_floor = "–" if floor is None else f"< {floor} MB"
        rows.append((name, f"{values['growth_mb']} MB", shown_floor, verdict))
    growth = ", ".join(str(mb) for mb in found["1000 open/close cycles"]["growth_mb_by_100"])
    text = "\n".join(
        [
            f"Memory. {report.describe(facts)}.",
            "Growth of resident memory over a process with the kernels loaded.",
            "",
            report.table(["", "growth", "floor", ""], rows),
            "",
            f"Growth after each 100 cycles, MB: {growth}.",
        ]
    )
    print(text)
    path = report.save("memory", {"machine": facts, "cases": found})
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\n{path.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
