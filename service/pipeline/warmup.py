"""Compiles the kernels before the service is ready, by running each once.

The first time, parts of them are compiled in processes of their own, at the same time: numba holds
a lock while it compiles. ``python -m betrace.service.pipeline.warmup PART ...`` compiles parts and
prints the name of each kernel when it is compiled.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import trio
from numba.core import event
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.channels import ThreadRunner
from betrace.service import jit
from betrace.service.otlp import json, wire
from betrace.service.otlp.columns import TRACE_HI, TRACE_LO
from betrace.service.otlp.subset import spans_of, wanted_traces
from betrace.service.rules.column_rules import ColumnRule
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import make_rule
from betrace.service.rules.parse import parse
from betrace.service.rules.read_columns import columns_of
from betrace.service.rules.syntax import Attribute, Scope
from betrace.service.traces.decide import decide
from betrace.service.traces.late_filter import ClosedTraces
from betrace.service.traces.tenant_traces import TenantTraces

_log = logging.getLogger("service.warmup")

_COMPLETE = "complete"  # the file that says that the cache has every kernel

_RULES = (
    "when { warm.up.where(a == 1 and b contains x) } always { up.* }",
    "count(warm.up) > 1 or warm.up before x",
)
_RELATIONAL = (
    "never { warm.up.where(a == 1 and exists(a) and event()) }",
    "never { *.where(ancestor(*) and descendant(*)) }",
    "never { *.where(followed_by(*) and preceded_by(*)) }",
)


def _sample() -> bytes:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in (1, 2):
        span = spans.add(trace_id=b"t" * 16, span_id=bytes([number] * 8), name="warm.up")
        span.attributes.add(key="a").value.int_value = 1
    return request.SerializeToString()


def warm_up(parts: Iterable[str] | None = None) -> None:
    """Compile every kernel that a request needs, or those of some parts, or load them from the
    cache on disk."""
    for part in PARTS if parts is None else parts:
        PARTS[part]()


def _warm_up_traces() -> None:
    wire.warm_up()
    rules = [
        make_rule({"id": f"r{i}", "condition": condition}) for i, condition in enumerate(_RULES)
    ]
    traces = TenantTraces("warm-up", compile_rules(rules, "warm-up"))
    batch = wire.scan_bodies("warm-up", [_sample()])
    for _, folded in traces.fold(batch, 1):
        if folded.early is not None:
            decide(folded.early)
    for due in traces.close_due(10, 1, 1):
        decide(due)
    closed = ClosedTraces(1 << 12)
    traces.fold(batch, 20, closed)  # reopens them
    traces.close_due(40, 1)
    traces.evict(10**10, 1, 0, closed)
    traces.fold(batch, 10**10, closed)


def _warm_up_relations() -> None:
    batch = wire.scan_bodies("warm-up", [_sample()])
    ids = [(int(batch.spans[0, TRACE_HI]), int(batch.spans[0, TRACE_LO]))]
    part = wire.scan_bodies("warm-up", [spans_of(_sample(), wanted_traces(lo for _, lo in ids))])
    whole = columns_of(part, ids)
    for rule in _RELATIONAL:
        ColumnRule(parse(rule)).run(whole)
    for span in whole.tree(0).spans:
        span.read(Attribute(Scope.ANY, "a"))


PARTS: dict[str, Callable[[], None]] = {
    "json": json.warm_up,
    "relations": _warm_up_relations,
    "traces": _warm_up_traces,
}
"""``json``: what only requests with JSON need; ``relations``: what only rules that relate spans
need; ``traces``: everything else."""

_PROCESSES = (("json", "relations"), ("traces",))  # each takes about as long


class Compilation:
    """The compilation of the kernels of some parts, by default all, and how far it is."""

    def __init__(self, parts: Collection[str] = tuple(PARTS)) -> None:
        self._parts = [part for part in PARTS if part in parts]
        self._compiled: set[str] = set()
        self.running = False

    @property
    def progress(self) -> str:
        """How many kernels of how many are compiled."""
        return f"{len(self._compiled)} of {len(jit.kernels)}"

    async def run(self, threads: ThreadRunner) -> None:
        """Compile every kernel, or load it from the cache on disk."""
        complete = jit.cache_directory() / _COMPLETE
        several = len(os.sched_getaffinity(0)) > 1 and jit.is_enabled()
        several = several and len(self._parts) == len(PARTS)
        if several and not await threads.run(complete.exists):
            self.running = True
            async with trio.open_nursery() as nursery:
                for parts in _PROCESSES:
                    nursery.start_soon(self._compile_elsewhere, parts)
        await threads.run(warm_up, self._parts, abandon_on_cancel=True)
        self.running = False
        if several:
            with suppress(OSError):  # the next start compiles again, or finds it compiled
                await threads.run(partial(complete.touch, exist_ok=True))

    async def _compile_elsewhere(self, parts: Sequence[str]) -> None:
        command = [sys.executable, "-P", "-m", __spec__.name, *parts]
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(jit.cache_directory())}
        try:
            async with trio.open_nursery() as nursery:
                process: trio.Process = await nursery.start(
                    partial(
                        trio.run_process,
                        command,
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        check=False,
                    )
                )
                assert process.stdout is not None
                rest = b""
                async for chunk in process.stdout:
                    *lines, rest = (rest + chunk).split(b"\n")
                    self._compiled.update(line.decode() for line in lines)
        except* OSError as errors:  # this process compiles everything
            _log.warning("kernels cannot be compiled in a second process: %s", errors.exceptions[0])


class _PrintCompiled(event.Listener):
    def on_start(self, event: event.Event) -> None:
        pass

    def on_end(self, event: event.Event) -> None:
        function = event.data["dispatcher"].py_func
        print(f"{function.__module__}.{function.__qualname__}", flush=True)


if __name__ == "__main__":
    register: Any = event.register
    register("numba:compile", _PrintCompiled())
    warm_up(sys.argv[1:])
