"""Alerts by rule, from the ledger to a webhook."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import trio

from betrace.service.export.alerts import alerts as alerts_module
from betrace.service.export.alerts import sender as sender_module
from betrace.service.pipeline.breakers import Breakers
from betrace.service.signals import Kind, Signal
from betrace.service.storage.alert_store import AlertStore, AlertStoreError
from betrace.service.storage.ledger.base import LedgerError
from betrace.service.storage.ledger.sqlite import SqliteLedger
from betrace.service.storage.signal_queues import LedgerQueues
from tests.support.alerting import alerting, record, settings, signal, until
from tests.support.http_receiver import Receiver


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (alerts_module, sender_module):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(module, "LONGEST_PAUSE", 0.05)
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(alerts_module, "REST_SECONDS", 0.01)


def to(hook: Receiver, wait_seconds: float = 0, **more: Any) -> dict[str, Any]:
    return {"webhook": {"url": hook.url, "wait_seconds": wait_seconds}, **more}


def told(hook: Receiver) -> list[tuple[str, str, str]]:
    """Status, rule and count of each alert that the webhook accepted."""
    return [
        (each["status"], each["labels"]["alertname"], each["annotations"]["count"])
        for each in hook.alerts()
    ]


async def test_a_webhook_gets_one_notification_when_it_begins_and_one_when_it_ends(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    config = settings(
        tmp_path, **to(hook, 0.3, resolve_after_seconds=1, runbook_url="https://w/{tenant}/{rule}")
    )
    async with alerting(config, ledger) as alerts:
        both = [signal(number, rule) for number in range(1, 21) for rule in ("r1", "r2")]
        record(ledger, alerts, *both)
        await until(lambda: len(hook.alerts()) == 4)
    assert sorted(told(hook)) == [
        ("firing", "r1", "20"),
        ("firing", "r2", "20"),
        ("resolved", "r1", "20"),
        ("resolved", "r2", "20"),
    ]
    by_rule = [each for each in hook.alerts() if each["labels"]["alertname"] == "r1"]
    assert len({each["fingerprint"] for each in by_rule}) == 1
    assert by_rule[0]["endsAt"].startswith("0001")
    assert by_rule[0]["annotations"]["runbook_url"] == "https://w/shop/r1"
    first = json.loads(hook.taken()[0])
    assert (first["version"], first["status"], len(first["alerts"])) == ("4", "firing", 1)
    assert "trace_id" not in first["alerts"][0]["labels"]


async def test_signals_from_before_alerts_were_configured_page_nobody(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    ledger.record([signal(1, "old")])
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        record(ledger, alerts, signal(2, "new"), signal(3, "new", tenant="other"))
        await until(lambda: len(hook.alerts()) == 2)
    links = {each["labels"]["tenant"]: each["generatorURL"] for each in hook.alerts()}
    assert links == {
        "shop": f"https://b.example/signals/{signal(2, 'new').id}?tenant=shop",
        "other": f"https://b.example/signals/{signal(3, 'new', 'other').id}?tenant=other",
    }
    assert {rule for _, rule, _ in told(hook)} == {"new"}


async def test_a_crash_loses_nothing_and_repeats_nothing(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    config = settings(tmp_path, **to(hook))
    muted: list[str] = []
    async with alerting(config, ledger) as alerts:
        record(ledger, alerts, signal(1))
        await until(lambda: len(hook.alerts()) == 1)
    ledger.record([signal(2), signal(3, "r2")])
    async with alerting(config, ledger, muted_now=lambda *_: bool(muted)) as alerts:
        await until(lambda: len(hook.alerts()) == 2)
        await until(lambda: sum(alert.count for alert in alerts.book) == 3)
        muted.append("both")
        await until(lambda: len(hook.alerts()) == 4)
    assert sorted(told(hook)) == [
        ("firing", "r1", "1"),
        ("firing", "r2", "1"),
        ("resolved", "r1", "2"),
        ("resolved", "r2", "1"),
    ]
    store = AlertStore(tmp_path / "alerts.sqlite")
    assert store.progress() == {"shop": 3}
    store.close()


async def test_muted_signals_page_nobody_and_a_mute_ends_the_alert(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    mutes: set[str] = set()

    def muted(raised: Signal) -> bool:
        return raised.rule_id == "quiet"

    async with alerting(
        settings(tmp_path, **to(hook)), ledger, muted, lambda tenant, rule: rule in mutes
    ) as alerts:
        record(ledger, alerts, signal(1, "quiet"), signal(2, "loud"))
        await until(lambda: len(hook.alerts()) == 1)
        mutes.add("loud")
        await until(lambda: len(hook.alerts()) == 2)
        assert alerts.book.resolved["muted"] == 1
        assert alerts.book.firing == 0
    assert [(status, rule) for status, rule, _ in told(hook)] == [
        ("firing", "loud"),
        ("resolved", "loud"),
    ]


async def test_an_alert_whose_signals_were_retracted_before_it_was_sent_is_not_sent(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    async with alerting(settings(tmp_path, **to(hook, 30)), ledger) as alerts:
        record(ledger, alerts, signal(1), signal(1, kind=Kind.RETRACTED))
        await until(lambda: alerts.book.resolved["retracted"] == 1)
        await until(lambda: len(alerts.book) == 0)
    assert hook.requests == []


async def test_a_retraction_of_an_older_signal_does_not_end_the_alert(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    ledger.record([signal(1)])
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        record(ledger, alerts, signal(2), signal(1, kind=Kind.RETRACTED), signal(3))
        await until(lambda: bool(hook.alerts()))
        await until(lambda: next(iter(alerts.book)).count == 2)
        assert alerts.book.firing == 1


async def test_with_more_signals_than_are_remembered_only_the_quiet_time_ends_the_alert(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    many = 600
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        record(ledger, alerts, *(signal(number) for number in range(many)))
        record(ledger, alerts, *(signal(n, kind=Kind.RETRACTED) for n in range(many)))
        await until(lambda: ledger.last_entry("shop") == alerts._done.get("shop"))
        assert alerts.book.firing == 1


@pytest.mark.slow
async def test_a_rule_that_breaks_again_while_the_webhook_is_down_stays_one_alert(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    config = settings(tmp_path, **to(hook, resolve_after_seconds=3))
    async with alerting(config, ledger) as alerts:
        record(ledger, alerts, signal(1))
        await until(lambda: len(hook.alerts()) == 1)
        hook.answers = [(503, {})] * 100_000
        await until(lambda: alerts.book.resolved["quiet"] == 1)
        record(ledger, alerts, signal(2))
        await until(lambda: alerts.book.started == 2)
        (sender,) = alerts
        failures = sender.failures
        await until(lambda: sender.failures >= failures + 2)  # no request is older than that
        hook.answers = []
        await until(lambda: len(hook.alerts()) >= 2)
        await until(lambda: hook.alerts()[-1]["status"] == "resolved")
    last = hook.alerts()[-1]
    assert (last["status"], last["annotations"]["count"]) == ("resolved", "2")
    assert last["startsAt"] == hook.alerts()[0]["startsAt"]


async def test_alerts_are_bounded_and_the_rest_is_counted(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(tmp_path, **to(hook, max_active=2, resolve_after_seconds=2))
    async with alerting(config, ledger) as alerts:
        record(ledger, alerts, *(signal(number, f"r{number}") for number in range(1, 6)))
        await until(lambda: alerts.book.overflowed == 3)
        assert alerts.book.started == 2
        await until(lambda: len(alerts.book) == 0)
        record(ledger, alerts, signal(9, "r9"))
        await until(lambda: alerts.book.started == 3)
    assert sum("pages nobody" in each.getMessage() for each in caplog.records) == 1


async def test_alerts_of_a_deleted_tenant_are_forgotten(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        record(ledger, alerts, signal(1), signal(2, tenant="other"))
        await until(lambda: len(hook.alerts()) == 2)
        alerts.forget("shop")
        assert [alert.tenant for alert in alerts.book] == ["other"]
    db = sqlite3.connect(tmp_path / "alerts.sqlite")
    assert db.execute("SELECT tenant FROM alerts").fetchall() == [("other",)]
    db.close()


async def test_it_goes_on_when_the_ledger_or_its_own_file_failed(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        failing = [True]
        entries, save = ledger.entries, alerts._store.save

        def fragile(tenant: str, after: int = 0, limit: int = 1000) -> list[tuple[int, Signal]]:
            if failing:
                raise LedgerError("gone", transient=True)
            return entries(tenant, after, limit)

        def unsaved(*arguments: Any) -> None:
            if failing:
                raise AlertStoreError("full")
            save(*arguments)

        monkeypatch.setattr(ledger, "entries", fragile)
        record(ledger, alerts, signal(1))
        await trio.sleep(0.1)
        monkeypatch.setattr(ledger, "entries", entries)
        monkeypatch.setattr(alerts._store, "save", unsaved)
        await until(lambda: len(hook.alerts()) == 1)
        failing.clear()
        await until(lambda: (alerts._store.progress() or {}).get("shop") == 1)
    assert told(hook) == [("firing", "r1", "1")]


async def test_a_webhook_that_rejects_an_alert_does_not_hold_up_the_others(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    hook.refuses = "unspeakable"
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        record(ledger, alerts, signal(1, message="unspeakable"), signal(2, "r2"))
        await until(lambda: told(hook) == [("firing", "r2", "1")])
        (sender,) = alerts
        await until(lambda: (sender.sent, sender.rejected, sender.failures) == (1, 1, 0))


async def test_the_breaker_opens_and_alerts_arrive_after_the_outage(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    hook.answers = [(503, {"Retry-After": "1"})] * 12
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        (sender,) = alerts
        record(ledger, alerts, signal(1))
        await until(lambda: sender.breaker.snapshot().not_permitted > 0)
        sender.breaker.force_open()
        await trio.sleep(0.05)
        sender.breaker.reset()
        await until(lambda: told(hook) == [("firing", "r1", "1")])
        assert sender.failures > 4


async def test_without_destinations_nothing_is_read(tmp_path: Path, ledger: SqliteLedger) -> None:
    config = settings(tmp_path)
    store = AlertStore(tmp_path / "alerts.sqlite")
    alerts = alerts_module.Alerts(
        config,
        LedgerQueues(ledger),
        store,
        Breakers(config.breakers),
        lambda _: False,
        lambda *_: False,
    )
    alerts.notify([signal(1)])
    await alerts.run()
    assert list(alerts) == []
    assert store.progress() is None
    alerts.close()
    store.close()


def test_damaged_and_newer_files_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "alerts.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(AlertStoreError, match="damaged"):
        AlertStore(path)
    path.unlink()
    AlertStore(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(AlertStoreError, match="newer"):
        AlertStore(path)


async def test_an_alert_that_cannot_be_read_is_left_out(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    store = AlertStore(tmp_path / "alerts.sqlite")
    store.save({("shop", "r1"): b"{}"}, {"shop": 0})
    store.close()
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        record(ledger, alerts, signal(1))
        await until(lambda: told(hook) == [("firing", "r1", "1")])
    assert any("damaged" in each.getMessage() for each in caplog.records)


async def test_a_flood_of_signals_is_few_requests(
    tmp_path: Path, ledger: SqliteLedger, hook: Receiver
) -> None:
    async with alerting(settings(tmp_path, **to(hook)), ledger) as alerts:
        flood = [signal(number, f"r{number % 10}") for number in range(5000)]
        record(ledger, alerts, *flood)
        await until(lambda: sum(alert.count for alert in alerts.book) == 5000)
        (sender,) = alerts
        await until(lambda: sender.sent == 10)
    assert len(hook.taken()) <= 11  # one may be repeated after a timeout
