"""CPU of a whole service at everyday rates, many requests far below what it could take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from perf import beside, load
from perf.lib.target import GeneratorProcess, Service, service

SECONDS = 2.0  # of a measurement
ROWS = {
    "service, 10 000 spans/s": beside.Row(100, 10_000),
    "service, 10 000 spans/s JSON": beside.Row(100, 10_000, json=True),
    "service, 1 000 spans/s": beside.Row(20, 1_000),
}


@contextmanager
def figures() -> Iterator[dict[str, Callable[[], float]]]:
    """By name, measurements that return CPU seconds for 100 000 spans. The service starts with the
    first measurement."""
    running: list[Service] = []
    with ExitStack() as stack:

        def target() -> Service:
            if not running:
                settings = {"traces__idle_seconds": str(beside.IDLE_SECONDS)}
                started = service(rules=beside.RULES, tenants=beside.TENANTS, settings=settings)
                running.append(stack.enter_context(started))
            return running[0]

        yield {name: lambda row=row: measure(target(), row) for name, row in ROWS.items()}


def measure(target: Service, row: beside.Row) -> float:
    """CPU seconds of the service for 100 000 spans at a row's rate."""
    options = beside.load_options(row, SECONDS)
    generator = GeneratorProcess(load.arguments(options, row.spans, target.ingest))
    try:
        generator.start()
        generator.wait_begin()
        before = target.cpu_seconds()
        time.sleep(SECONDS)
        used = target.cpu_seconds() - before
        result = generator.wait_end()
    finally:
        generator.stop()
    if result["errors"]:
        raise RuntimeError(f"requests failed: {result['errors']}")
    return 1e5 * used / max(1, int(result["spans"]))
