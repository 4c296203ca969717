"""Alerts by rule on a ledger, without the rest of the service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from betrace.service.config.settings import Settings
from betrace.service.export.alerts.alerts import Alerts
from betrace.service.pipeline.breakers import Breakers
from betrace.service.signals import Signal
from betrace.service.storage.alert_store import AlertStore
from betrace.service.storage.ledger.base import LedgerEntries
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.signal_queues import LedgerQueues
from tests.support.ledger_conformance import make

WAIT_SECONDS = 60


def settings(tmp_path: Path, **alerts: Any) -> Settings:
    return Settings.model_validate(
        {
            "storage": {"path": tmp_path},
            "api": {"public_url": "https://b.example"},
            "alerts": alerts,
            "breakers": {"export": {"open_seconds": 0.1, "timeout_seconds": 60}},
        }
    )


@asynccontextmanager
async def alerting(
    config: Settings,
    ledger: LedgerEntries,
    muted: Callable[[Signal], bool] = lambda _: False,
    muted_now: Callable[[str, str], bool] = lambda *_: False,
) -> AsyncIterator[Alerts]:
    """Run alerts on the ledger until the block ends, as abruptly as a crash."""
    store = AlertStore(config.storage.path / "alerts.sqlite")
    breakers = Breakers(config.breakers, list(config.alerts.destinations))
    alerts = Alerts(config, LedgerQueues(ledger), store, breakers, muted, muted_now)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alerts.run)
            await until(lambda: store.progress() is not None)
            yield alerts
            nursery.cancel_scope.cancel()
    finally:
        alerts.close()
        store.close()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_SECONDS):
        while not condition():
            await trio.sleep(0.02)


def signal(number: int, rule: str = "r1", tenant: str = "shop", **changes: Any) -> Signal:
    """A signal that is detected now."""
    return make(number, rule, tenant, **{"detected_at": time.time_ns()} | changes)


def record(ledger: SqliteLedger, alerts: Alerts, *signals: Signal) -> None:
    ledger.record(signals)
    alerts.notify(list(signals))
