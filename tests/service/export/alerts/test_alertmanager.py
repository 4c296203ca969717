"""Alerts arrive in a real Alertmanager, and in its notifications."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from betrace.service.export.alerts import alerts as alerts_module
from betrace.service.signals import Kind
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.support.alerting import alerting, record, settings, signal, until
from tests.support.alertmanager import PROGRAM, WHY_NOT, AlertmanagerProcess, alertmanager
from tests.support.http_receiver import Receiver

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)

CONFIG = """\
route:
  receiver: hook
  group_by: [tenant]
  group_wait: 200ms
  group_interval: 1s
  repeat_interval: 1h
receivers:
  - name: hook
    webhook_configs: [{{url: "{url}", send_resolved: true}}]
inhibit_rules:
  - source_matchers: [severity="critical"]
    target_matchers: [severity="high"]
    equal: [tenant]
"""


@pytest.fixture
def manager(tmp_path: Path, hook: Receiver) -> Iterator[AlertmanagerProcess]:
    with alertmanager(tmp_path / "am", CONFIG.format(url=hook.url)) as running:
        yield running


@pytest.fixture(autouse=True)
def updates_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts_module, "UPDATE_NS", 0)


def notifications(hook: Receiver) -> list[dict[str, Any]]:
    return [json.loads(body) for body in hook.taken()]


async def test_many_breaches_are_one_alert_with_a_count_and_examples(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess, hook: Receiver
) -> None:
    config = settings(tmp_path, alertmanager={"urls": [manager.url]})
    muted: list[str] = []
    async with alerting(config, ledger, muted_now=lambda *_: bool(muted)) as alerts:
        breaches = [signal(number, labels={"team.name": "pay"}) for number in range(1, 201)]
        record(ledger, alerts, *breaches)

        def count() -> str:
            found = manager.alerts()
            return found[0]["annotations"]["count"] if found else ""

        await until(lambda: count() == "200")
        (alert,) = manager.alerts()
        assert alert["labels"] == {
            "alertname": "r1",
            "tenant": "shop",
            "severity": "high",
            "team_name": "pay",
        }
        examples = alert["annotations"]["examples"].split("\n")
        assert examples[0] == (
            f"trace {breaches[199].trace_id}: https://b.example/signals/{breaches[199].id}?tenant=shop"
        )
        assert len(examples) == 5
        assert alert["annotations"]["summary"] == (
            "200 traces broke the rule r1 of tenant shop. The latest: paid twice – größer"
        )
        assert alert["generatorURL"] == f"https://b.example/signals/{breaches[199].id}?tenant=shop"

        await until(lambda: len(hook.taken()) == 1)
        muted.append("r1")
        await until(lambda: not manager.alerts())
        await until(lambda: len(hook.taken()) == 2)
    fired, resolved = notifications(hook)
    assert [fired["status"], resolved["status"]] == ["firing", "resolved"]
    assert len(fired["alerts"]) == len(resolved["alerts"]) == 1
    assert resolved["alerts"][0]["annotations"]["count"] == "200"
    assert resolved["alerts"][0]["startsAt"] == fired["alerts"][0]["startsAt"]


async def test_retracting_all_signals_resolves_at_once(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess, hook: Receiver
) -> None:
    config = settings(tmp_path, alertmanager={"urls": [manager.url]})
    async with alerting(config, ledger) as alerts:
        record(ledger, alerts, signal(1), signal(2))
        await until(lambda: len(hook.taken()) == 1)
        record(ledger, alerts, signal(1, kind=Kind.RETRACTED))
        await until(lambda: manager.alerts()[0]["annotations"]["count"] == "1")
        record(ledger, alerts, signal(2, kind=Kind.RETRACTED))
        await until(lambda: len(hook.taken()) == 2)
    assert [each["status"] for each in notifications(hook)] == ["firing", "resolved"]


async def test_a_restart_neither_loses_nor_repeats_an_alert(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess, hook: Receiver
) -> None:
    config = settings(tmp_path, alertmanager={"urls": [manager.url]})
    muted: list[str] = []
    async with alerting(config, ledger) as alerts:
        record(ledger, alerts, signal(1))
        await until(lambda: len(hook.taken()) == 1)
    before = manager.alerts()[0]
    ledger.record([signal(2)])  # recorded, and then the process died
    async with alerting(config, ledger, muted_now=lambda *_: bool(muted)):
        await until(lambda: manager.alerts()[0]["annotations"]["count"] == "2")
        after = manager.alerts()[0]
        assert after["startsAt"] == before["startsAt"]
        assert after["fingerprint"] == before["fingerprint"]
        muted.append("r1")
        await until(lambda: len(hook.taken()) == 2)
    assert [each["status"] for each in notifications(hook)] == ["firing", "resolved"]


async def test_an_alertmanager_that_was_restarted_gets_the_alert_again(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess
) -> None:
    wanted = {"alertmanager": {"urls": [manager.url]}, "resend_seconds": 0.5}
    async with alerting(settings(tmp_path, **wanted), ledger) as alerts:
        record(ledger, alerts, signal(1))
        await until(lambda: len(manager.alerts()) == 1)
        manager.stop()
        manager.start()  # it keeps no alerts
        await until(lambda: len(manager.alerts()) == 1)


@pytest.mark.slow
async def test_an_outage_of_alertmanager_does_not_hide_that_a_rule_was_broken(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess, hook: Receiver
) -> None:
    config = settings(tmp_path, alertmanager={"urls": [manager.url]}, resolve_after_seconds=6)
    manager.stop()
    async with alerting(config, ledger) as alerts:
        record(ledger, alerts, signal(1))
        await until(lambda: alerts.book.resolved["quiet"] == 1)
        assert alerts.lag_seconds("alerts-alertmanager") > 0
        manager.start()
        await until(lambda: len(hook.taken()) == 2)
        await until(lambda: alerts.lag_seconds("alerts-alertmanager") == 0)
    assert [each["status"] for each in notifications(hook)] == ["firing", "resolved"]


async def test_grouping_silences_and_inhibition_work(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess, hook: Receiver
) -> None:
    config = settings(tmp_path, alertmanager={"urls": [manager.url]})
    manager.silence("shop", "silenced")
    async with alerting(config, ledger) as alerts:

        def told(tenant: str) -> set[str]:
            return {
                alert["labels"]["alertname"]
                for each in notifications(hook)
                if each["groupLabels"] == {"tenant": tenant}
                for alert in each["alerts"]
            }

        def status() -> dict[str, Any]:
            return {each["labels"]["alertname"]: each["status"] for each in manager.alerts()}

        record(
            ledger,
            alerts,
            signal(1, "loud", severity="critical"),
            signal(2, "also-loud", severity="critical"),
            signal(3, "silenced", severity="critical"),
        )
        # A group may be notified before all of its alerts are there, those that inhibit too.
        await until(lambda: told("shop") == {"loud", "also-loud"})
        record(
            ledger,
            alerts,
            signal(4, "inhibited", severity="high"),
            signal(5, "elsewhere", tenant="other", severity="high"),
        )
        await until(lambda: told("other") == {"elsewhere"})
        await until(lambda: len(status()) == 5)
        await until(lambda: status()["inhibited"]["inhibitedBy"])
        assert status()["silenced"]["silencedBy"]
    assert told("shop") == {"loud", "also-loud"}


async def test_all_members_of_a_cluster_get_the_alert(
    tmp_path: Path, ledger: SqliteLedger, manager: AlertmanagerProcess, hook: Receiver
) -> None:
    with alertmanager(tmp_path / "am2", CONFIG.format(url=hook.url)) as second:
        config = settings(tmp_path, alertmanager={"urls": [manager.url, second.url]})
        async with alerting(config, ledger) as alerts:
            record(ledger, alerts, signal(1))
            await until(lambda: len(manager.alerts()) == len(second.alerts()) == 1)
            names = [sender.name for sender in alerts]
    assert names == ["alerts-alertmanager", "alerts-alertmanager-2"]


def test_the_documented_configuration_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[4] / "docs/alerts.md").read_text("utf-8")
    (config,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "alertmanager.yml").write_text(config)
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("amtool is not on PATH (Debian: prometheus-alertmanager)")
    ran = subprocess.run(
        [amtool, "check-config", str(tmp_path / "alertmanager.yml")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
