"""Signals reach their destination at least once, despite failures."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from betrace.channels import BreakerState
from betrace.service.config.settings import Settings
from betrace.service.config.stages import EXPORT_OTLP as OTLP
from betrace.service.config.stages import EXPORT_WEBHOOK as WEBHOOK
from betrace.service.export.destinations import Exports
from betrace.service.signals import Kind, Signal
from betrace.service.storage.ledger.base import LedgerEntries, LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.signal_queues import LedgerQueues
from tests.support.http_receiver import Receiver, receiving
from tests.support.inprocess import closed, running, send, write_rules
from tests.support.inprocess import settings as service_settings
from tests.support.ledger_conformance import make
from tests.support.spans import S

from betrace.service.pipeline.breakers import Breakers  # isort: skip
from betrace.service.export import exporter as exporter_module  # isort: skip


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(exporter_module, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(exporter_module, "POLL_SECONDS", 0.1)


def configured(tmp_path: Path, **export: dict[str, str]) -> Settings:
    return Settings.model_validate(
        {
            "storage": {"path": tmp_path},
            "export": export,
            "breakers": {"export": {"open_seconds": 0.1, "timeout_seconds": 60}},
        }
    )


@asynccontextmanager
async def exporting(
    settings: Settings, ledger: LedgerEntries, muted: Callable[[Signal], bool] = lambda _: False
) -> AsyncIterator[Exports]:
    breakers = Breakers(settings.breakers, settings.export.destinations)
    exports = Exports(settings, LedgerQueues(ledger), breakers, muted)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exports.run)
            yield exports
            nursery.cancel_scope.cancel()
    finally:
        exports.close()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


def cursor(tmp_path: Path, name: str = OTLP) -> Path:
    return tmp_path / "export" / f"{name}.json"


async def begun(tmp_path: Path, name: str = OTLP) -> None:
    await until(cursor(tmp_path, name).exists)


async def test_a_new_destination_gets_only_new_signals(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    ledger.record([make(1)])
    settings = configured(tmp_path, otlp={"endpoint": receiver.url, "headers": "x-key=abc"})
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path)
        new = [make(2), make(3, tenant="other")]
        ledger.record(new)
        exports.notify(new)
        await until(lambda: len(receiver.records()) == 2)
        (exporter,) = exports
        await until(lambda: exporter.sent == 2 and exporter.lag_seconds() == 0)
    assert {r.trace_id.hex() for r in receiver.records()} == {s.trace_id for s in new}
    assert receiver.requests[0][0]["x-key"] == "abc"
    assert receiver.requests[0][0]["content-type"] == "application/x-protobuf"


async def test_it_continues_where_it_stopped(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    settings = configured(tmp_path, otlp={"endpoint": receiver.url})
    async with exporting(settings, ledger):
        await begun(tmp_path)
    ledger.record([make(number) for number in range(1, 4)])  # without a notification
    async with exporting(settings, ledger):
        await until(lambda: len(receiver.records()) == 3)
        await until(lambda: bool(json.loads(cursor(tmp_path).read_text())))
    async with exporting(settings, ledger) as exports:
        ledger.record([make(9)])
        exports.notify([make(9)])
        await until(lambda: len(receiver.records()) == 4)
    assert [r.trace_id[-1] for r in receiver.records()] == [1, 2, 3, 9]


async def test_a_destination_gets_everything_after_an_outage(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    receiver.answers = [(503, {"Retry-After": "1"}), (401, {}), (500, {}), (429, {}), (502, {}),
                        (503, {})]  # fmt: skip
    settings = configured(tmp_path, otlp={"endpoint": receiver.url})
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path)
        (exporter,) = exports
        ledger.record([make(number) for number in range(1, 6)])
        exports.notify([make(1)])
        await until(lambda: exporter.failures > 2)
        assert exporter.lag_seconds() >= 0
        assert exporter.waiting_since is not None
        await until(lambda: exporter.sent == 5)
    assert [r.trace_id[-1] for r in receiver.records()] == [1, 2, 3, 4, 5]
    assert exporter.failures == 6
    told = [record.getMessage() for record in caplog.records if record.name == "service.events"]
    assert [text for text in told if "cannot send signals" in text][1:] == []
    assert any("accepts signals again" in text for text in told)


async def test_the_breaker_opens_and_an_operator_can_close_it(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    settings = configured(tmp_path, otlp={"endpoint": "http://127.0.0.1:9/v1/logs"})
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path)
        (exporter,) = exports
        ledger.record([make(1)])
        exports.notify([make(1)])
        breaker = exporter.breaker
        await until(lambda: breaker.state is BreakerState.OPEN)
        breaker.force_open()
        before = exporter.failures
        await trio.sleep(0.2)
        assert exporter.failures == before
        assert exporter.sent == 0


async def test_only_the_rejected_signal_is_skipped(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    receiver.refuses = "unspeakable"
    settings = configured(tmp_path, otlp={"endpoint": receiver.url})
    signals = [make(n, message="unspeakable" if n == 4 else "fine") for n in range(1, 8)]
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path)
        ledger.record(signals)
        exports.notify(signals)
        (exporter,) = exports
        await until(lambda: exporter.sent + exporter.rejected == 7)
        assert exporter.rejected == 1
        assert exporter.breaker.state is BreakerState.CLOSED
    assert [r.trace_id[-1] for r in receiver.records()] == [1, 2, 3, 5, 6, 7]


async def test_many_signals_of_many_tenants_arrive_in_order(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "BATCH_SIGNALS", 10)
    settings = configured(tmp_path, otlp={"endpoint": receiver.url})
    tenants = [f"t{n}" for n in range(15)]
    signals = [make(n, tenant=tenant) for tenant in tenants for n in range(1, 8)]
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path)
        for at in range(0, len(signals), 100):
            ledger.record(signals[at : at + 100])
        exports.notify(signals)
        await until(lambda: len(receiver.records()) >= len(signals))
    assert len(receiver.records()) == len(signals)
    assert all(len(body) < 20_000 for body in receiver.taken())


async def test_webhooks_get_firing_and_resolved_alerts(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    settings = configured(
        tmp_path, webhook={"url": receiver.url, "external_url": "https://b.example"}
    )
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path, WEBHOOK)
        signals = [make(1), make(1, kind=Kind.RETRACTED), make(2, rule="r2")]
        ledger.record(signals)
        exports.notify(signals)
        await until(lambda: len(receiver.alerts()) == 3)
    assert [(a["labels"]["alertname"], a["status"]) for a in receiver.alerts()] == [
        ("r1", "firing"),
        ("r1", "resolved"),
        ("r2", "firing"),
    ]
    assert receiver.requests[0][0]["content-type"] == "application/json"


async def test_a_damaged_progress_file_starts_with_new_signals(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger, caplog: pytest.LogCaptureFixture
) -> None:
    cursor(tmp_path).parent.mkdir()
    cursor(tmp_path).write_text("{")
    ledger.record([make(1)])
    async with exporting(configured(tmp_path, otlp={"endpoint": receiver.url}), ledger) as exports:
        await until(lambda: "shop" in cursor(tmp_path).read_text())
        ledger.record([make(2)])
        exports.notify([make(2)])
        await until(lambda: len(receiver.records()) == 1)
    assert "damaged" in caplog.text


class Fragile:
    """A ledger that fails at first."""

    def __init__(self, ledger: SqliteLedger, failures: int) -> None:
        self._ledger = ledger
        self.failures = failures

    def __getattr__(self, name: str) -> object:
        if self.failures:
            self.failures -= 1
            raise LedgerError("away", transient=True)
        return getattr(self._ledger, name)


async def test_reading_the_ledger_is_retried(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    fragile = Fragile(ledger, 2)
    settings = configured(tmp_path, otlp={"endpoint": receiver.url})
    async with exporting(settings, fragile) as exports:  # type: ignore[arg-type]
        await begun(tmp_path)
        fragile.failures = 2
        ledger.record([make(1)])
        exports.notify([make(1)])
        await until(lambda: len(receiver.records()) == 1)


@pytest.mark.slow
async def test_signals_of_the_running_service_are_exported(
    tmp_path: Path, receiver: Receiver
) -> None:
    write_rules(tmp_path, {"twice": "count(pay) > 1"})
    config = service_settings(
        tmp_path,
        export={"otlp": {"endpoint": receiver.url}},
        audit={"batches": True},
    )
    async with running(config) as service:
        await until((config.storage.path / "export" / f"{OTLP}.json").exists)
        await send(service, [S(1, "pay"), S(2, "pay")])
        await closed(service)
        await until(lambda: len(receiver.records()) == 1)
        exposition = (await service.tools.exposition.scrape()).decode()
        assert 'betrace_export_signals_total{destination="export-otlp",outcome="sent"} 1.0' in (
            exposition
        )
        assert 'betrace_circuit_breaker_state{name="export-otlp",state="closed"} 1.0' in exposition
    (line,) = (config.storage.path / "batches.jsonl").read_text().splitlines()
    assert json.loads(line) | {"received_ns": 0, "bytes": 0} == {
        "received_ns": 0,
        "tenant": "default",
        "spans": 2,
        "rejected": 0,
        "bytes": 0,
        "segment": 1,
        "offset": 128,
    }


async def test_webhooks_do_not_get_muted_signals_but_the_retractions(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger
) -> None:
    settings = configured(tmp_path, webhook={"url": receiver.url})
    muted, loud = make(1), make(2)
    retracted = make(3, kind=Kind.RETRACTED)

    def is_muted(signal: Signal) -> bool:
        return signal.id in (muted.id, retracted.id)

    async with exporting(settings, ledger, is_muted) as exports:
        await begun(tmp_path, WEBHOOK)
        ledger.record([muted, loud, retracted])
        exports.notify([loud])
        (exporter,) = exports
        await until(lambda: exporter.sent == 3)
    found = [(each["status"], each["labels"]["trace_id"]) for each in receiver.alerts()]
    assert found == [("firing", loud.trace_id), ("resolved", retracted.trace_id)]


@pytest.mark.parametrize("kind", [OTLP, WEBHOOK])
async def test_signals_of_shadow_rules_are_not_sent(
    tmp_path: Path, receiver: Receiver, ledger: SqliteLedger, kind: str
) -> None:
    where = {
        OTLP: {"otlp": {"endpoint": receiver.url}},
        WEBHOOK: {"webhook": {"url": receiver.url}},
    }
    settings = configured(tmp_path, **where[kind])
    shadow = {"mode": "shadow"}
    quiet = replace(make(1), context=shadow)
    retracted = replace(make(2, kind=Kind.RETRACTED), context=shadow)
    async with exporting(settings, ledger) as exports:
        await begun(tmp_path, kind)
        ledger.record([quiet, retracted])
        exports.notify([quiet])
        (exporter,) = exports
        await until(lambda: list(json.loads(cursor(tmp_path, kind).read_text()).values()) == [2])
        assert (exporter.sent, exporter.lag_seconds()) == (0, 0.0)
        ledger.record([make(3)])
        exports.notify([make(3)])
        await until(lambda: exporter.sent == 1)
    assert len(receiver.taken()) == 1
