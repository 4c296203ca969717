"""Writing a rule on its page: checked, tested against a trace, and saved."""

from __future__ import annotations

from tests.service.api.pages.conftest import TRACE

RULE = {"id": "mine", "name": "My rule", "severity": "high", "enabled": "on", "condition": "charge"}


async def test_a_rule_is_written_and_changed(browser):
    await browser.get("/rule-editor")
    fields = {**RULE, "labels": "team = shop, tier=1", "action": "save", "description": "Mine."}
    await browser.post("/rule-editor", fields)
    assert browser.location == "/rules/mine"
    page = await browser.get("/rules/mine")
    assert "Mine." in page
    assert "<bdi>tier</bdi>" in page
    assert "/rule-editor?id=mine" in browser.links("/rule-editor")
    page = await browser.get("/rule-editor?id=mine")
    assert 'value="team=shop, tier=1"' in page
    etag = page.partition('name="etag" value="')[2].partition('"')[0].replace("&#34;", '"')
    changed = {**RULE, "action": "save", "etag": etag, "condition": "a\r\nor b"}
    await browser.post("/rule-editor", changed)
    page = await browser.get("/rules/mine")
    assert "Version " in page  # the earlier one
    await browser.get("/rule-editor")
    page = await browser.post("/rule-editor", changed, 412)
    assert "has changed" in page
    assert "a\nor b" in page  # what was typed is not lost
    await browser.get("/rule-editor")
    page = await browser.post("/rule-editor", {**RULE, "action": "save"}, 428)
    assert "exists already" in page
    await browser.get("/rule-editor")
    assert "id is" in await browser.post("/rule-editor", {**RULE, "id": "A", "action": "save"}, 400)


async def test_mistakes_have_a_caret(browser):
    await browser.get("/rule-editor")
    wrong = {**RULE, "condition": "when { a }\nalways { b"}
    page = await browser.post("/rule-editor", {**wrong, "action": "check"}, 200)
    assert "Line 2, column" in page
    assert "always { b\n          ^" in page
    page = await browser.post("/rule-editor", {**wrong, "action": "save"}, 400)
    assert "Line 2, column" in page
    page = await browser.post("/rule-editor", {**RULE, "action": "check"}, 200)
    assert "The condition is valid" in page


async def test_a_rule_is_checked_while_it_is_typed(browser):
    await browser.get("/rule-editor")
    token = browser.form_token()
    page = await browser.post(
        "/rule-editor/check", {"condition": "a b <x>", "form_token": token}, 200, token=False
    )
    assert "<html" not in page
    assert 'class="mistake"' in page
    assert "&lt;x&gt;" in page
    page = await browser.post(
        "/rule-editor/check", {"condition": "a", "form_token": token}, 200, token=False
    )
    assert "valid" in page


async def test_a_rule_is_tested_against_a_trace(browser):
    await browser.get("/rule-editor")
    tested = {**RULE, "action": "test", "trace_id": TRACE.hex()}
    page = await browser.post("/rule-editor", tested, 200)
    assert "Broken:" in page
    assert "found 1" in page
    page = await browser.post("/rule-editor", {**tested, "condition": "count(charge) > 5"}, 200)
    assert "Kept:" in page
    page = await browser.post("/rule-editor", {**tested, "condition": "oh no"}, 400)
    assert 'class="mistake"' in page
    page = await browser.post("/rule-editor", {**tested, "trace_id": "x"}, 400)
    assert "trace_id is" in page


async def test_saving_keeps_what_the_form_does_not_show(browser):
    kept = {"condition": "charge", "mode": "shadow", "incomplete": "skip"}
    await browser.client.put("/api/v1/rules/mine", json=kept)
    page = await browser.get("/rule-editor?id=mine")
    etag = page.partition('name="etag" value="')[2].partition('"')[0].replace("&#34;", '"')
    await browser.post("/rule-editor", {**RULE, "action": "save", "etag": etag, "name": "New"})
    rule = browser.service.registry.store.rule("default", "mine")
    assert (rule.name, rule.mode, rule.incomplete) == ("New", "shadow", "skip")
    assert "shadow" in await browser.get("/rules/mine")
