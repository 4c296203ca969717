"""Every action by its key: confirmation, request and toast."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from betrace.tui.changes import OperatorChange
from betrace.tui.widgets.dialogs import Ask, Confirm
from tests.support.tui_fake import FakeApi, piloted, refusal, screen_text, toasts, until

ACTIONS = [
    ("2", "P", "/api/admin/pipeline/pause", "ingestion: open → paused", "ingestion is paused"),
    ("2", "D", "/api/admin/pipeline/drain?wait=10", "channels: in use → empty", "drained"),
    ("2", "R", "/api/admin/pipeline/resume", "ingestion: paused → open", "ingestion is open"),
    ("3", "T", "/api/admin/breakers/rule-evaluation/trip", "state: closed → open", "is open"),
    ("3", "F", "/api/admin/breakers/rule-evaluation/force-open", "→ forced open", "is forced open"),
    ("3", "X", "/api/admin/breakers/rule-evaluation/disable", "→ disabled", "is disabled"),
    ("3", "R", "/api/admin/breakers/rule-evaluation/reset", "→ closed", "is closed"),
    (
        "4",
        "I",
        "/api/performance/cache-invalidate/ruleContainers",
        "12 → 0",
        "12 entries removed",
    ),
    (
        "4",
        "W",
        "/api/admin/cache-warmup",
        "plus those of active tenants",
        "loaded for 2 tenants, 1 failed",
    ),
    ("6", "X", "/api/v1/rules/fraud-check", "enabled → disabled", "fraud-check disabled"),
    (
        "6",
        "D",
        "/api/v1/rules/fraud-check",
        "rule: version 566b9383915a782e → none",
        "fraud-check deleted",
    ),
    (
        "7",
        "R",
        "/api/admin/dead-letters/1/retry",
        "1 letter with 3 items: kept → sent back",
        "1 queued",
    ),
    ("7", "D", "/api/admin/dead-letters/1/discard", "items: kept → deleted", "1 discarded"),
    (
        "7",
        "A",
        "/api/admin/dead-letters/retry",
        "letters: 3 kept → sent back",
        "3 queued for retry",
    ),
    ("8", "D", "/api/admin/tenants/acme?wait=10", "active → deleted", "acme is deleted"),
    ("9", "C", "/api/admin/checkpoint", "age of the checkpoint: 20 s → 0 s", "1.1 MiB"),
    ("9", "F", "/api/admin/fallback/replay", "fallback files: 42 → written back", "wrote back"),
]


PANELS = sorted({panel for panel, *_ in ACTIONS})


@pytest.mark.parametrize("number", PANELS)
def test_an_action_asks_first_and_reports_its_result(number):
    @piloted()
    async def run(pilot, api):
        app = pilot.app
        await pilot.press(number)
        for _, key, path, effect, message in (each for each in ACTIONS if each[0] == number):
            before, shown = api.posted(), len(toasts(app))
            await pilot.press(key)
            await until(lambda effect=effect: effect in screen_text(app))
            assert isinstance(app.screen, Confirm)
            assert app.focused.id == "cancel"
            assert api.posted() == before
            await pilot.press("right", "enter")
            await until(lambda shown=shown: len(toasts(app)) > shown)
            assert api.posted() == [*before, path]
            assert toasts(app)[-1][0] == "✔ done"
            assert message in toasts(app)[-1][1]

    run()


@piloted()
async def test_a_cancelled_action_is_not_performed(pilot, api):
    app = pilot.app
    ways = (("enter",), ("escape",), ("n",), ("q",), ("l", "h", "enter"))
    for (number, action), keys in zip(("2P", "2D", "3F", "4W", "4I"), ways, strict=True):
        await pilot.press(number, action)
        await until(lambda: isinstance(app.screen, Confirm))
        await pilot.press(*keys)
        await until(lambda: not isinstance(app.screen, Confirm))
    await pilot.pause()
    assert api.posted() == []
    assert toasts(app) == []


@piloted(read_only=True)
async def test_read_only_disables_all_changes(pilot, api):
    app = pilot.app
    others = [("4", "T"), ("6", "E"), ("6", "A"), *(("8", key) for key in "CUKV")]
    for number, key, *_ in (*ACTIONS, *others):
        await pilot.press(number, key)
        await pilot.pause()
        assert len(app.screen_stack) == 1
    assert "READ-ONLY" in screen_text(app)
    app.change(OperatorChange("Really?", "Do it", app.client.pause))
    await pilot.pause()
    assert toasts(app) == [("✖ not done", "This TUI was started with --read-only.")]
    assert api.posted() == []


@piloted()
async def test_y_confirms(pilot, api):
    await pilot.press("3", "j", "R")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert api.posted() == ["/api/admin/breakers/ledger/reset"]
    await until(lambda: "✖ open" not in screen_text(pilot.app))


@piloted()
async def test_a_refusal_is_reported_with_its_remedy(pilot, api):
    api.routes["POST", "/api/admin/pipeline/pause"] = refusal(
        503, "the audit log cannot be written", "make room on the disk"
    )
    await pilot.press("2", "P")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [
        ("✖ refused", "the audit log cannot be written; make room on the disk")
    ]


@piloted()
async def test_a_timeout_is_reported(pilot, api):
    def slow(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("timed out", request=request)

    api.routes["POST", "/api/admin/pipeline/pause"] = slow
    await pilot.press("2", "P")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✖ timed out", "the service did not answer in time")]


@piloted()
async def test_an_unfinished_drain_reports_what_is_left(pilot, api):
    api.routes["POST", "/api/admin/pipeline/drain"] = {
        "ingestion": "paused",
        "drained": False,
        "waiting": {"projection": 12},
    }
    await pilot.press("2", "D")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✔ done", "still not empty after 10 s: projection 12")]


@piloted()
async def test_a_cache_is_emptied_for_one_tenant(pilot, api):
    app = pilot.app
    await pilot.press("4", "j", "T")
    await until(lambda: isinstance(app.screen, Ask))
    await pilot.press(*"No", "enter")
    await pilot.pause()
    assert "use 1 to 63 of" in screen_text(app)
    assert isinstance(app.screen, Ask)
    await pilot.press("backspace", "backspace", *"shop", "enter")
    await until(lambda: isinstance(app.screen, Confirm))
    await pilot.pause()
    assert "publicKeys for tenant shop?" in screen_text(app)
    await pilot.press("y")
    await until(lambda: bool(toasts(app)))
    assert api.posted() == ["/api/performance/cache-invalidate/publicKeys?tenantId=shop"]


@piloted()
async def test_no_change_without_a_tenant(pilot, api):
    await pilot.press("4", "T")
    await until(lambda: isinstance(pilot.app.screen, Ask))
    await pilot.press("escape")
    await pilot.pause(0.05)
    assert not isinstance(pilot.app.screen, Ask | Confirm)
    assert api.posted() == []


def test_reading_does_not_change_the_fake():
    async def read() -> None:
        api = FakeApi()
        before = api.data
        app = api.app()
        assert await app.client.snapshot() == before
        await app.client.close()

    asyncio.run(read())
