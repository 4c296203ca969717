"""The operator's actions in the TUI, on a running service under load."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from textual.widgets import TextArea

from betrace.service.cli.demo.ports import free_port
from betrace.tui.app import BetraceApp
from betrace.tui.client import ApiClient
from betrace.tui.panels.rule_edit import RuleEditor
from betrace.tui.widgets.dialogs import Ask, Confirm
from tests.e2e.test_python_sdk import pay
from tests.support.process import Running, running
from tests.support.tui_fake import screen_text, toasts, until

pytestmark = pytest.mark.slow

WAIT = 60.0


@contextmanager
def load(service: Running) -> Iterator[None]:
    """Send payments, some of which violate a rule, until the service or the test ends."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.05) and service.process.poll() is None:
            pay(service, 2000.0)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Operator:
    """Presses keys, and waits for the results."""

    def __init__(self, app: BetraceApp, pilot) -> None:
        self.app, self.pilot = app, pilot

    async def change(self, *keys: str) -> str:
        """Press keys, confirm, and return the text of the toast."""
        before = len(toasts(self.app))
        await self.pilot.press(*keys)
        await self.until(lambda: isinstance(self.app.screen, Confirm))
        await self.pilot.press("y")
        await self.until(lambda: len(toasts(self.app)) > before)
        title, told = toasts(self.app)[-1]
        assert title == "✔ done", told
        self.app.clear_notifications()
        return told

    async def choose(self, name: str) -> None:
        """Move the cursor to a row, from the first one."""
        await self.until(lambda: name in self.app.panel._shown)
        await self.pilot.press("home", "ctrl+home")
        for _ in range(20):
            if self.app.panel.selected == name:
                return
            await self.pilot.press("j")
        raise AssertionError(f"there is no row {name}")

    async def until(self, condition) -> None:
        try:
            await until(condition, WAIT)
        except TimeoutError:
            raise AssertionError(screen_text(self.app)) from None


async def operate(operator: Operator, service: Running) -> None:
    app, press = operator.app, operator.pilot.press
    breaker = lambda: app.state.now.breakers[0].state  # noqa: E731

    assert "is open" in await operator.change("3", "T")
    assert breaker() == "open"
    assert "is closed" in await operator.change("R")

    await press("5")
    await operator.until(lambda: "● live" in screen_text(app) and "fraud-check" in screen_text(app))
    await press("enter")
    await operator.until(lambda: "◆a" in screen_text(app) and "POST /pay" in screen_text(app))
    await press("escape")

    # Traces that are decided while the breaker is forced open become dead letters.
    assert "forced open" in await operator.change("3", "F")
    await press("7")
    await operator.until(lambda: bool(app.panel._shown))
    await operator.change("3", "R")
    await press("7", "x")
    assert "queued for retry" in await operator.change("R")  # it may have been retried by itself
    if app.panel._shown:
        assert "queued for retry" in await operator.change("A")
    await operator.until(lambda: not app.panel._shown)

    assert "removed from ruleContainers" in await operator.change("4", "I")
    assert "ingestion is paused" in await operator.change("2", "P")
    assert app.state.now.ingestion == "paused"
    assert "ingestion is open" in await operator.change("R")

    await press("6")
    await operator.choose("mine")
    await press("E")
    await operator.until(lambda: isinstance(app.screen, RuleEditor))
    app.screen.query_one(TextArea).text = "never { payment.bypass }"
    await operator.until(lambda: "the condition is valid" in screen_text(app))
    assert "mine saved" in await operator.change("ctrl+s")
    saved = service.get("/api/v1/rules/mine").json()
    assert saved["condition"] == "never { payment.bypass }"

    await press("8", "C")
    await operator.until(lambda: isinstance(app.screen, Ask))
    await press(*"acme", "enter")
    await operator.until(lambda: "Public key of acme" in screen_text(app))
    assert "acme is active" in await operator.change("enter")
    await operator.choose("acme")
    assert "acme is" in await operator.change("D")
    assert "checkpoint saved" in await operator.change("9", "C")


def test_all_actions_on_a_running_service(tmp_path: Path):
    api, ingest = free_port(), free_port()
    options = ("--api", f"127.0.0.1:{api}", "--ingest", f"127.0.0.1:{ingest}")

    async def drive() -> None:
        async with ApiClient(f"http://127.0.0.1:{api}") as client:
            app = BetraceApp(client)
            with running(tmp_path, *options) as service, load(service):
                rule = {"condition": "never { bypass }", "severity": "low"}
                url = f"{service.api}/api/v1/rules/mine"
                assert httpx.put(url, json=rule, trust_env=False).status_code == 201
                context = app.run_test(size=(80, 24), notifications=True)
                pilot = await context.__aenter__()
                try:
                    operator = Operator(app, pilot)
                    await operator.until(lambda: app.connection.link.status == "connected")
                    await operator.until(lambda: app.state.now.signals > 0)
                    await operate(operator, service)
                    service.process.kill()
                    await operator.until(lambda: app.connection.link.status == "lost")
                    assert "STALE" in screen_text(app)
                    with running(tmp_path, *options):
                        await pilot.press("space")
                        await operator.until(lambda: app.connection.link.status == "connected")
                        await pilot.press("6")
                        await operator.until(lambda: "mine" in screen_text(app))
                        assert "STALE" not in screen_text(app)
                finally:
                    await context.__aexit__(None, None, None)

    asyncio.run(drive())
