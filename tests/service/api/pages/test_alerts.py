"""The alerts that fire now, over the API, on the overview and in the terminal."""

from __future__ import annotations

import pytest
import trio
from click.testing import CliRunner

from betrace.service.cli import alerts as module
from betrace.service.cli.api_client import ServiceApi
from betrace.service.cli.main import cli
from betrace.service.export.alerts.alert import Alert
from tests.service.api.pages.conftest import browsing
from tests.service.api.pages.test_pages import text_of
from tests.support.http_receiver import receiving
from tests.support.inprocess import closed, send
from tests.support.spans import S


async def answer(browser, path="/api/v1/alerts"):
    found = await browser.client.get(path)
    assert found.status_code == 200
    return await found.get_json()


async def test_an_alert_fires_with_its_examples_and_destinations(tmp_path):
    with receiving() as hook:
        webhook = {"url": hook.url, "wait_seconds": 0}
        public = {"public_url": "http://pages.example"}
        async with browsing(tmp_path, alerts={"webhook": webhook}, api=public) as browser:
            assert await answer(browser) == {
                "alerts": [],
                "total": 0,
                "destinations": ["alerts-webhook"],
            }
            assert "nobody is paged" in await browser.get("/")
            traces = [bytes([n] * 16) for n in range(1, 8)]
            await send(
                browser.service, [S(n, "bypass", trace) for n, trace in enumerate(traces, 1)]
            )
            await closed(browser.service)
            with trio.fail_after(60):
                while not (found := (await answer(browser))["alerts"]) or found[0]["count"] < 7:
                    await trio.sleep(0.02)
                while not (found := (await answer(browser))["alerts"])[0]["delivered"]:
                    await trio.sleep(0.02)
            (alert,) = found
            assert (alert["rule_id"], alert["severity"]) == ("no-bypass", "low")
            assert alert["started"] <= alert["last"] < alert["ends"]
            assert alert["delivered"]["alerts-webhook"]["state"] == "firing"
            assert len(alert["examples"]) == 5
            for example in alert["examples"]:
                assert example["trace_id"] in [each.hex() for each in traces]
                assert example["url"].startswith("http://pages.example/signals/")
            words = text_of(await browser.get("/"))
            assert "Alerts that fire now" in words
            assert "no-bypass" in words
            assert "7 traces" in words
            newest = alert["examples"][0]["signal"]
            assert f"/signals/{newest}" in browser.links("/signals/")
            other = await browser.client.get("/api/v1/alerts", headers={"x-scope-orgid": "other"})
            assert (await other.get_json())["total"] == 0


async def test_without_destinations_there_are_no_alerts(browser):
    assert await answer(browser) == {"alerts": [], "total": 0, "destinations": []}
    assert "Alerts that fire now" not in await browser.get("/")


@pytest.mark.parametrize(
    ("alerts", "destinations", "says"),
    [
        ([], [], "names no destination"),
        ([], ["alerts-webhook"], "no alert fires"),
        (1, ["alerts-webhook"], "2026-01-01T00:00:00Z  2026-01-01T00:01:00Z  high"),
    ],
)
def test_alerts_in_the_terminal(monkeypatch, alerts, destinations, says):
    alert = {
        "rule_id": "r",
        "severity": "high",
        "started": "2026-01-01T00:00:00.000000000Z",
        "last": "2026-01-01T00:01:00.000000000Z",
        "count": 3,
        "examples": [{"message": "r: forbidden: x"}],
        "delivered": {"alerts-webhook": {}},
    }
    found = [alert] * (alerts or 0) if isinstance(alerts, int) else []
    shown = {"alerts": found, "total": 2 * len(found), "destinations": destinations}
    monkeypatch.setattr(module, "ServiceApi", lambda *_, **__: FakeApi(shown))
    result = CliRunner().invoke(cli, ["alerts"])
    assert result.exit_code == 0, result.output
    assert says in result.output
    assert ("list more with --limit" in result.output) == bool(found)
    assert CliRunner().invoke(cli, ["alerts", "--json"]).stdout.startswith("[")


class FakeApi(ServiceApi):
    """Answers everything with the same."""

    def __init__(self, shown):
        self.shown = shown

    def ask(self, *_, **__):
        return self.shown


async def test_the_overview_shows_few_alerts_and_the_rest_on_demand(browser, monkeypatch):
    now = 1_700_000_000 * 10**9
    found = [Alert("default", f"r{n}", "high", {}, now - n, now - n) for n in range(120)]
    alerts = type(browser.service.tools.sources.alerts)
    monkeypatch.setattr(alerts, "firing", lambda *_: found)
    monkeypatch.setattr(alerts, "destinations", ["alerts-webhook"])
    page = await browser.get("/")
    shown, rest = page.split("<details>")[:2]
    assert "r3<" in shown
    assert "r4<" not in shown
    assert "96 more alerts" in rest
    assert "r99<" in rest
    assert "and 20 more alerts" in text_of(page)
    assert "nobody knows yet" in shown
