"""Memory of tenants, rules and live spans, and whether deleting tenants releases it.

``python -m perf.memory`` creates and deletes tenants in the running service. For the other cases it
measures the resident memory of a separate process, after the kernels are loaded.
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

import httpx
import psutil

from betrace.service.config.stores import DuckDb
from betrace.service.otlp.wire import scan_bodies
from betrace.service.pipeline.warmup import warm_up
from betrace.service.rules.compile import CompiledRules, compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.traces.tenant_traces import TenantTraces
from perf.generator import TENANT_HEADER
from perf.lib.engine import TENANT
from perf.lib.target import Service, service
from perf.lib.workload import Shape, make_bodies, rule_definitions
from perf.report import output

SECOND = 1_000_000_000
MB = 1e6
TOGETHER = 20  # tenants of a cycle that exist at the same time
CYCLE_RULES = 5

Json = dict[str, Any]


class _Tenants:
    """Tenants as in the service: compiled rules, traces, a log, a file of the query store."""

    def __init__(self, directory: Path, rules: int, stack: ExitStack) -> None:
        self._log = stack.enter_context(SpanLog(directory))
        self._store = stack.enter_context(DuckStore(directory, DuckDb(idle_close_seconds=1e-9)))
        self._rules = rules
        self.open: dict[str, tuple[CompiledRules, TenantTraces]] = {}

    def begin(self, tenant: str, body: bytes, spans: int) -> None:
        """Add a tenant with live spans."""
        definitions = [make_rule(d) for d in rule_definitions(self._rules)]
        rules = compile_rules(definitions, "1")
        traces = TenantTraces(tenant, rules)
        batch = scan_bodies(tenant, [body])
        frame = Frame("protobuf", "", time.time_ns(), body, spans)
        batch.positions = _positions(self._log.append(tenant, [frame]))
        traces.fold(batch, SECOND)
        self.open[tenant] = rules, traces


def _positions(given: list[int]) -> Any:
    import numpy as np

    return np.array(given, np.int64)


def _rss() -> float:
    """Return resident memory in bytes, after returning free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss)


def _body(spans: int, rules: int = 100, breaches: float = 0.01) -> bytes:
    return bytes(make_bodies(Shape(spans=spans, rules=rules, breaches=breaches), 1)[0].data)


def cycles(count: int) -> Json:
    """Create tenants with rules in the running service, send 100 spans to each, wait until they are
    stored, and delete the tenants, ``TOGETHER`` at a time. Return the growth of the service's
    memory."""
    body = _body(100, CYCLE_RULES, 0.5)
    steps: list[float] = []
    settings = {"traces__idle_seconds": "0.2", "duckdb__flush_most_seconds": "0.3"}
    with (
        service(rules=CYCLE_RULES, settings=settings) as target,
        httpx.Client(timeout=90, trust_env=False) as client,
    ):

        def some(names: list[str]) -> None:
            for name in names:
                _create(client, target, name, body)
            target.settle(0)
            for name in names:
                _delete(client, target, name)

        some([f"warm-up-{i:04d}" for i in range(min(count, TOGETHER))])
        start, signals = target.rss(), target.metrics()["signalsRaised"]
        began = time.perf_counter()
        for first in range(0, count, TOGETHER):
            some([f"cycle-{i:04d}" for i in range(first, min(count, first + TOGETHER))])
            steps.append(round((target.rss() - start) / MB, 1))
        taken = time.perf_counter() - began
        signals = target.metrics()["signalsRaised"] - signals
    return {
        "growth_mb": steps[-1],
        "growth_mb_by_step": steps,
        "cycles": count,
        "signals": signals,
        "ms_per_cycle": round(1000 * taken / count, 1),
        "floor_mb": 100,
    }


def _create(client: httpx.Client, target: Service, name: str, body: bytes) -> None:
    client.post(f"{target.api}/api/admin/tenants", json={"tenant": name}).raise_for_status()
    for rule in rule_definitions(CYCLE_RULES):
        url = f"{target.api}/api/v1/rules/{rule['id']}"
        client.put(url, json=rule, headers={TENANT_HEADER: name}).raise_for_status()
    headers = {"content-type": "application/x-protobuf", TENANT_HEADER: name}
    client.post(f"{target.ingest}/v1/traces", content=body, headers=headers).raise_for_status()


def _delete(client: httpx.Client, target: Service, name: str) -> None:
    gone = client.delete(f"{target.api}/api/admin/tenants/{name}", params={"wait": 60})
    gone.raise_for_status()
    if gone.json()["state"] != "deleted":
        raise TimeoutError(f"{name} was not deleted within a minute")


def one_tenant(directory: Path) -> Json:
    """Measure one tenant with 100 rules and 1000 live spans."""
    with ExitStack() as stack:
        tenants = _Tenants(directory, 100, stack)
        body = _body(1000)
        start = _rss()
        tenants.begin(TENANT, body, 1000)
        held = tenants.open[TENANT][1].nbytes
        return {"growth_mb": round((_rss() - start) / MB, 1), "traces_bytes": held, "floor_mb": 50}


def many_tenants(directory: Path, count: int = 500) -> Json:
    """Measure tenants with 50 rules and 100 live spans each."""
    with ExitStack() as stack:
        tenants = _Tenants(directory, 50, stack)
        body = _body(100)
        start = _rss()
        for i in range(count):
            tenants.begin(f"tenant-{i:04d}", body, 100)
        growth = _rss() - start
        return {
            "growth_mb": round(growth / MB, 1),
            "kb_per_tenant": round(growth / count / 1000, 1),
            "floor_mb": None,
        }


CASES: dict[str, Callable[[Path], Json]] = {
    "one tenant, 100 rules, 1000 live spans": one_tenant,
    "500 tenants, 50 rules and 100 live spans each": many_tenants,
}


def _measure(name: str, queue: Any) -> None:
    warm_up()
    with tempfile.TemporaryDirectory(prefix="betrace-perf-", dir=os.environ.get("PERF_TMP")) as d:
        queue.put(CASES[name](Path(d)))


def _apart(name: str) -> Json:
    """Measure a case in a separate process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(name, queue))
    process.start()
    found: Json = queue.get(timeout=600)
    process.join()
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000, help="number of create/delete cycles")
    parser.add_argument("--only", nargs="+", choices=["cycles", *CASES], default=["cycles", *CASES])
    options = parser.parse_args(given)
    facts = output.machine()
    found: Json = {}
    for name in options.only:
        if name == "cycles":
            title = f"{options.cycles} create/send/delete cycles of a tenant"
            found[title] = cycles(options.cycles)
        else:
            found[name] = _apart(name)
    rows = []
    for name, values in found.items():
        floor = values["floor_mb"]
        verdict = "–" if floor is None else "reached" if values["growth_mb"] < floor else "MISSED"
        shown_floor = "–" if floor is None else f"< {floor} MB"
        rows.append((name, f"{values['growth_mb']} MB", shown_floor, verdict))
    lines = [
        f"Memory. {output.describe(facts)}.",
        "Growth of resident memory: for the cycles, of the running service (after the first "
        f"{TOGETHER}); otherwise, of a separate process with the kernels loaded. A cycle creates a "
        f"tenant with {CYCLE_RULES} rules, evaluates and stores 100 of its spans, and deletes it "
        f"with all its data; {TOGETHER} tenants exist at a time.",
        "",
        output.table(["", "growth", "floor", ""], rows),
    ]
    for values in found.values():
        if "growth_mb_by_step" in values:
            growth = ", ".join(str(mb) for mb in values["growth_mb_by_step"])
            lines += [
                "",
                f"Growth after each {TOGETHER} cycles, MB: {growth}; {values['ms_per_cycle']} ms a "
                f"cycle; {values['signals']:,} signals were raised.",
            ]
    text = "\n".join(lines)
    print(text)
    output.say_saved("memory", {"machine": facts, "cases": found}, text)


if __name__ == "__main__":
    main()
