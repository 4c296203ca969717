"""The whole service in this process, without listeners; it can be stopped or killed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path
from typing import Any, Protocol

import trio

from betrace.service.app.builder import open_service
from betrace.service.app.service import Service
from betrace.service.config.settings import Settings
from betrace.service.pipeline.request import Done, Refused, Reply, Request
from betrace.service.signals import Signal
from tests.support.engine import active
from tests.support.spans import S, body

OFF = {"address": "off"}


class Place(Protocol):
    """Where services run, if not as one process: :class:`tests.support.on_cluster.OnCluster`."""

    def opened(self, config: Settings) -> AbstractContextManager[Service]: ...
    def running(self, config: Settings, *, die: bool) -> AbstractAsyncContextManager[Service]: ...
    async def send(self, service: Service, request: Request) -> None: ...
    async def folded(self, service: Service) -> None: ...
    async def closed(self, service: Service) -> None: ...


place: Place | None = None
"""Set by the fixture ``place``; None is one process."""


def settings(directory: Path, **sections: dict[str, Any]) -> Settings:
    """Settings for a service on ``directory`` with a short idle time of traces."""
    given: dict[str, Any] = {
        "storage": {"path": directory / "data"},
        "ingest": OFF,
        "api": OFF,
        "metrics": OFF,
        "rules": {"directory": str(directory / "rules")},
        "log": {"scrub_bytes_per_second": 0},
        "traces": {"idle_seconds": 0.2},
        "checkpoint": {"interval_seconds": 3600},
        "duckdb": {"flush_ms": 20},
        "shutdown": {"delay_seconds": 0, "grace_seconds": 60},
        # The machine may be busy.
        "breakers": {name: {"timeout_seconds": 60} for name in ("evaluation", "storage")},
    }
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return Settings(**given)


def write_rules(directory: Path, rules: dict[str, str], tenant: str = "default") -> None:
    """Write rules by id to a rule file of the tenant."""
    folder = directory / "rules" / tenant
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"  - id: {id}\n    condition: '{text}'\n" for id, text in rules.items()]
    (folder / "rules.yaml").write_text("rules:\n" + "".join(lines))


@contextmanager
def opened(config: Settings) -> Iterator[Service]:
    """The service with its stores, but not running: enough for requests without a pipeline."""
    if place is not None:
        with place.opened(config) as service:
            yield service
        return
    with ExitStack() as stack:
        service = open_service(config, stack)()
        service.registry.store.load()
        try:
            yield service
        finally:
            service.close()


@asynccontextmanager
async def running(config: Settings, *, die: bool = False) -> AsyncIterator[Service]:
    """Run the service until the block ends; then it drains, or dies without saving anything."""
    if place is not None:
        async with place.running(config, die=die) as service:
            yield service
        return
    with ExitStack() as stack:
        service = open_service(config, stack)()
        async with served(service, die=die):
            yield service


@asynccontextmanager
async def served(service: Service, *, die: bool = False) -> AsyncIterator[None]:
    """Run an opened service until the block ends; then it drains, or dies without saving anything,
    and is closed."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            yield
            if die:
                nursery.cancel_scope.cancel()
            else:
                service.stop()
    finally:
        await threads_ended(service)
        service.close()


async def threads_ended(service: Service) -> None:
    """Wait until no worker thread is left behind: a dead process has none."""
    with trio.CancelScope(shield=True), trio.move_on_after(5):
        while any(t.statistics().left_behind for t in service.pipeline.threads.values()):
            await trio.sleep(0.01)


def request(data: bytes, tenant: str = "default", **more: Any) -> Request:
    now = time.time_ns()
    given = {"content_type": "protobuf", "encoding": "", "received_ns": now, "weight": 1} | more
    return Request(tenant=tenant, body=data, reply=Reply(), **given)


async def send(
    service: Service, spans: Sequence[S], tenant: str = "default", **more: Any
) -> Done | Refused:
    """Send spans in one request and wait for its outcome."""
    return await submit(
        service, request(body(*spans), tenant, **{"weight": max(1, len(spans))} | more)
    )


async def submit(service: Service, asked: Request) -> Done | Refused:
    """Send a request and wait for its outcome."""
    if place is not None:
        await place.send(service, asked)
    else:
        await service.pipeline.requests.send(asked)
    return await asked.reply.wait()


def ledger_signals(service: Service, tenant: str = "default") -> list[Signal]:
    """All signals of the tenant in the ledger, oldest first."""
    return [signal for _, signal in service.ledger.entries(tenant, 0, 1000)]


def active_signals(service: Service, tenant: str = "default") -> set[tuple[str, str]]:
    """Trace and rule of the active signals: raised and not retracted."""
    return active(ledger_signals(service, tenant))


async def put_rule(service: Service, tenant: str, rule_id: str, rule: dict[str, Any]) -> None:
    """Write a new rule, as the API does."""
    await trio.to_thread.run_sync(service.tools.rule_writer.put, tenant, rule_id, rule, None)


async def folded(service: Service) -> None:
    """Return when all accepted spans are in their traces."""
    if place is not None:
        await place.folded(service)
        return
    with trio.fail_after(60):
        while service.sources.account().in_flight:
            await trio.sleep(0.01)


async def closed(service: Service) -> None:
    """Return when no trace is open and everything is stored."""
    if place is not None:
        await place.closed(service)
        return
    still = 0
    with trio.fail_after(60):
        while still < 3:  # a thread may be between two of these in a single check
            await trio.sleep(0.02)
            # With the lock, no trace is between being open and being in flight, even if its thread
            # gets no CPU time.
            with service.pipeline.open_traces.lock:
                busy = service.sources.account().in_flight or len(service.pipeline.in_flight)
                opened = any(
                    traces.open_count
                    for traces in list(service.pipeline.open_traces.tenants.values())
                )
            still = 0 if busy or opened else still + 1
