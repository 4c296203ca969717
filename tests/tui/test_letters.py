"""The panels of dead letters, tenants and the system."""

from __future__ import annotations

import pytest

from betrace.tui.panels.dead_letters import retry_text
from betrace.tui.panels.tenants import check_key, quota_text
from betrace.tui.widgets.detail import Detail
from betrace.tui.widgets.dialogs import Ask, Confirm
from betrace.tui.widgets.pick import Pick
from tests.support import tui_records as records
from tests.support.tui_fake import T0, piloted, refusal, screen_text, toasts, until

PUBLIC = "-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n"


@piloted()
async def test_a_letter_opens_with_its_payload(pilot, api):
    await pilot.press("7")
    await until(lambda: "✖ 3 dead letters" in screen_text(pilot.app))
    assert "in 50 s" in screen_text(pilot.app)
    assert "manual" in screen_text(pilot.app)
    await pilot.press("enter")
    await until(lambda: isinstance(pilot.app.screen, Detail))
    await pilot.press("G")
    await until(lambda: '"fraud-check"' in screen_text(pilot.app))
    await pilot.press("escape")


@piloted()
async def test_a_description_follows_its_letter(pilot, api):
    app = pilot.app
    await pilot.press("7")
    await until(lambda: "3 dead letters" in screen_text(app))
    await pilot.press("enter")
    await until(lambda: "attempts      1" in screen_text(app))
    first, *others = records.letters()
    first["attempts"] = 9
    api.routes["GET", "/api/admin/dead-letters"] = {"deadLetters": [first, *others], "next": None}
    api.routes["GET", "/api/admin/dead-letters/1"] = {**first, "payload": records.PAYLOAD}
    await until(lambda: app.panel.loaded_at < 1e12)
    api.publish(after=6.0)
    await until(lambda: app._show() or "attempts      9" in screen_text(app))


@piloted()
async def test_marked_letters_are_retried_and_missing_ones_are_reported(pilot, api):
    app = pilot.app
    api.routes["POST", "/api/admin/dead-letters/2/retry"] = refusal(404, "no such letter", "")
    await pilot.press("7")
    await until(lambda: "3 dead letters" in screen_text(app))
    await pilot.press("x", "x")
    assert "✚ 2 marked" in screen_text(app)
    await pilot.press("R")
    await until(lambda: isinstance(app.screen, Confirm))
    await pilot.pause()
    assert "Retry 2 dead letters?" in screen_text(app)
    assert "2 letters with 6 items: kept → sent back to their stages" in screen_text(app)
    await pilot.press("y")
    await until(lambda: bool(toasts(app)))
    assert toasts(app)[0][1] == "1 queued for retry, 1 was already gone"
    assert api.posted() == [f"/api/admin/dead-letters/{n}/retry" for n in (1, 2)]
    await until(lambda: "marked" not in screen_text(app).splitlines()[2])


@piloted()
async def test_all_letters_are_marked_or_none(pilot, api):
    await pilot.press("7")
    await until(lambda: "3 dead letters" in screen_text(pilot.app))
    await pilot.press("X")
    assert "✚ 3 marked" in screen_text(pilot.app)
    await pilot.press("X")
    assert "✚" not in screen_text(pilot.app)


@piloted()
async def test_a_refusal_reports_how_many_were_changed(pilot, api):
    api.routes["POST", "/api/admin/dead-letters/2/discard"] = refusal(
        503, "disk full", "free some space"
    )
    await pilot.press("7")
    await until(lambda: "3 dead letters" in screen_text(pilot.app))
    await pilot.press("X", "D")
    await until(lambda: isinstance(pilot.app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(pilot.app)))
    assert toasts(pilot.app) == [("✖ refused", "stopped after 1 of 3: disk full; free some space")]


@piloted()
async def test_the_list_is_reloaded(pilot, api):
    await pilot.press("7")
    await until(lambda: "3 dead letters" in screen_text(pilot.app))
    await until(lambda: pilot.app.panel.loaded_at < 1e12)
    api.routes["GET", "/api/admin/dead-letters"] = {"deadLetters": [], "next": None}
    api.publish(after=6.0)
    await until(lambda: "No dead letters: no batch has failed for good." in screen_text(pilot.app))
    await pilot.press("x", "R", "D", "enter")  # no row to change
    assert len(pilot.app.screen_stack) == 1


def test_the_time_of_the_next_retry():
    assert retry_text(None, T0) == "manual"
    assert retry_text(T0 - 1, T0) == "now"
    assert retry_text(T0 + 61, T0) == "in 1 min 1 s"


# Tenants


async def listed(pilot):
    await pilot.press("8")
    await until(lambda: "acme" in screen_text(pilot.app))


@piloted()
async def test_a_tenant_is_opened_and_its_signals_are_shown(pilot, api):
    await listed(pilot)
    assert "5\u202f000" in screen_text(pilot.app)
    assert "○ implicit" in screen_text(pilot.app)
    await pilot.press("enter")
    await pilot.pause()
    assert "5\u202f000 spans/s" in screen_text(pilot.app)
    assert "does not expire" in screen_text(pilot.app)
    await pilot.press("escape", "o")
    await until(lambda: "tenant acme" in screen_text(pilot.app))
    assert pilot.app.client.tenant == "acme"


@piloted()
async def test_a_tenant_is_created(pilot, api):
    app = pilot.app
    await listed(pilot)
    await pilot.press("C")
    await until(lambda: isinstance(app.screen, Ask))
    await pilot.press(*"acme", "enter")
    await pilot.pause()
    assert "acme already exists" in screen_text(app)
    await pilot.press(*["backspace"] * 4, *"shop", "enter")
    await until(lambda: "Public key of shop" in screen_text(app))
    await pilot.press(*"nokey", "enter")
    await pilot.pause()
    assert "cannot be read" in screen_text(app)
    await pilot.press(*["backspace"] * 5, "enter")
    await until(lambda: isinstance(app.screen, Confirm))
    await pilot.press("y")
    await until(lambda: bool(toasts(app)))
    assert toasts(app)[0] == ("✔ done", "shop is active")
    assert api.sent("/api/admin/tenants") == {"tenant": "shop"}


@piloted()
async def test_a_quota_is_changed(pilot, api):
    app = pilot.app
    await listed(pilot)
    await pilot.press("U")
    await until(lambda: isinstance(app.screen, Ask))
    await pilot.press("x", "enter")
    await pilot.pause()
    assert "enter a whole number" in screen_text(app)
    await pilot.press(*["backspace"] * 5, *"700", "enter")
    await until(lambda: isinstance(app.screen, Confirm))
    await pilot.pause()
    assert "quota: 5\u202f000 spans/s → 700 spans/s" in screen_text(app)
    await pilot.press("y")
    await until(lambda: bool(toasts(app)))
    assert toasts(app)[0] == ("✔ done", "acme may send 700 spans/s")
    assert api.sent("/api/admin/tenants/acme/quota") == {"spansPerSecond": 700}


def test_a_key_is_rotated_and_one_revoked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k").write_text(PUBLIC)

    @piloted()
    async def run(pilot, api):
        app = pilot.app
        await listed(pilot)
        await pilot.press("K")
        await until(lambda: isinstance(app.screen, Ask))
        await pilot.press("k", "enter")
        await until(lambda: isinstance(app.screen, Confirm))
        await pilot.pause()
        assert "keys: 1 → the new one, and 1 more for one day" in screen_text(app)
        await pilot.press("y")
        await until(lambda: bool(toasts(app)))
        assert api.sent("/api/admin/tenants/acme/keys") == {"publicKey": PUBLIC}
        await pilot.press("V")
        await until(lambda: isinstance(app.screen, Pick))
        await pilot.press("enter")
        await until(lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")
        await until(lambda: len(toasts(app)) > 1)
        assert api.posted()[-1] == f"/api/admin/tenants/acme/keys/{'k' * 43}"
        await pilot.press("j", "V")
        await until(lambda: len(toasts(app)) > 2)
        assert toasts(app)[2][1] == (
            "default has sent spans but was not created; press C to create it first"
        )

    run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PUBLIC, ""),
        (PUBLIC.replace("PUBLIC", "PRIVATE"), "this is a private key"),
        ("hello", "this is not a public key"),
        ("ü", "cannot be read"),
    ],
)
def test_only_public_keys_leave_the_machine(tmp_path, text, message):
    path = tmp_path / "key.pem"
    path.write_text(text, encoding="utf-8")
    found = check_key(str(path))
    assert message in found
    assert bool(found) == bool(message)


def test_quotas_in_words():
    assert quota_text(None) == "the configured default"
    assert quota_text(0) == "no limit"


# The system


@piloted()
async def test_the_system_panel_shows_figures_and_errors(pilot, api):
    await pilot.press("9")
    await until(lambda: "1\u202f620 open traces" in screen_text(pilot.app))
    text = screen_text(pilot.app)
    for message in (
        "296 MiB",
        "25 % of a core",
        "2, 12",
        "42 records waiting",
        "20 s",
        "463 / 42 / 3",
    ):
        assert message in text
    api.routes["GET", "/api/admin/checkpoint"] = refusal(503, "no answer", "wait")
    await pilot.press("space")
    await until(lambda: "✖ not loaded: no answer; wait" in screen_text(pilot.app))
