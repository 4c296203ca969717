"""What the pages show, read as HTML without JavaScript."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import trio

from betrace.service.api.pages import signals
from betrace.service.api.pages.renderer import ASSETS, shown, took, utc
from betrace.service.api.pages.routes import HEADERS
from betrace.service.rules.store import RuleStore
from betrace.service.storage.duck.queries import SignalFilter
from betrace.service.storage.undecided import UndecidedTrace
from betrace.service.times import SECOND
from tests.service.api.pages.conftest import RULES, TRACE, broken, browsing, signal_id
from tests.support.api_records import NOW, make_signal
from tests.support.inprocess import closed, ledger_signals, send
from tests.support.spans import S


def text_of(html):
    """The words of a page."""
    html = re.sub(r"<(script|style|title).*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


@pytest.mark.also_on_cluster
async def test_from_a_signal_to_the_span_and_the_line(browser):
    page = await browser.get(f"/signals/{signal_id(browser)}")
    words = text_of(page)
    assert "Payments are checked" in words
    assert "Every charge needs a check." in words
    assert "missing fraud_check" in words
    assert "The rule requires this, and the trace does not have it." in words
    assert "team payments" in words
    (line,) = re.findall(r'<tr class="hit".*?</tr>', page, re.DOTALL)
    assert "<mark>fraud_check</mark>" in line
    assert 'id="broken-line-2"' in line
    assert "fraud_check never" not in words
    # The span that made the rule apply is marked and open, with the attribute that the rule names.
    (row,) = re.findall(r'<li class="marked[^"]*" id="s-(\w+)"', page)
    assert row == f"{2:016x}"
    assert re.search(r'class="named"><th scope="row"><bdi>x</bdi></th><td><bdi>1500</bdi>', page)
    assert browser.links(f"/traces/{TRACE.hex()}")
    assert browser.links("/rules/fraud-check")
    assert f"/signals/{signal_id(browser, 'no-bypass')}" in browser.links("/signals/")


async def test_another_span_is_selected_by_its_link(browser):
    page = await browser.get(f"/signals/{signal_id(browser)}")
    (link,) = {each for each in browser.links("/signals/") if f"span={3:016x}" in each}
    page = await browser.get(link.partition("#")[0])
    assert re.search(r'aria-current="true" data-span="0000000000000003"', page)
    assert "Status" in page
    assert "error" in page
    page = await browser.get(link.replace(f"{3:016x}", "no"))
    assert "is not in this trace" in page


async def test_the_overview_counts_and_links(browser):
    words = text_of(await browser.get("/"))
    assert "2 signals" in words
    assert "1 critical" in words
    assert "Payments are checked" in words
    for each in ("1h", "6h", "24h", "7d"):
        await browser.get(f"/?range={each}")
    assert "/signals?rule=no-bypass&since=-7d" in browser.links("/signals?")
    await browser.get("/?range=9y", 400)


async def test_signals_are_filtered_and_paged(browser):
    page = await browser.get("/signals")
    assert len(re.findall('class="active ', page)) == 2
    page = await browser.get("/signals?rule=fraud-check&severity=&status=active&since=-1h")
    assert len(re.findall('class="active ', page)) == 1
    assert '<bdi class="service">shop</bdi>' in page
    assert len(re.findall('class="active ', await browser.get("/signals?service=shop"))) == 2
    assert "No signal matches" in await browser.get("/signals?service=bank")
    assert "No signal matches" in await browser.get("/signals?severity=high")
    assert "status is" in await browser.get("/signals?status=odd", 400)
    many = [S(k + 10, "bypass", bytes([9] * 15 + [k])) for k in range(60)]
    await send(browser.service, many)
    await closed(browser.service)
    await browser.get("/signals?rule=no-bypass")
    (older,) = [link for link in browser.links("/signals?") if "cursor=" in link]
    assert "rule=no-bypass" in older
    page = await browser.get(older)
    assert len(re.findall('class="active ', page)) == 11
    assert "Older" not in page


async def test_a_trace_has_its_signals_and_verdicts(browser):
    page = await browser.get(f"/traces/{TRACE.hex()}")
    words = text_of(page)
    assert "POST /pay" in words
    assert words.count("breach signal") == 2
    page = await browser.get(f"/traces/{TRACE.hex()}?rule=no-bypass")
    assert re.findall(r'<li class="marked[^"]*" id="s-(\w+)"', page) == [f"{3:016x}"]
    raw = await browser.get(f"/traces/{TRACE.hex()}/spans/{2:016x}")
    assert '"name":"charge"' in raw
    await browser.get(f"/traces/{TRACE.hex()}/spans/{9:016x}", 404)
    await browser.get(f"/traces/{TRACE.hex()}/spans/x", 400)
    await browser.get(f"/traces/{'0' * 31}1", 404)


async def test_traces_are_listed_and_filtered(browser):
    words = text_of(await browser.get("/traces"))
    assert "POST /pay" in words
    assert "3 spans" in words
    assert "1 error" in words
    assert "POST /pay" in await browser.get("/traces?service=bank&has_signal=true&since=&name=")
    assert "No trace matches" in await browser.get("/traces?min_duration=10h")


async def test_a_rule_has_its_text_and_signals(browser):
    assert "Payments are checked" in await browser.get("/rules")
    words = text_of(await browser.get("/rules/fraud-check"))
    assert "always { fraud_check }" in words
    assert "default/rules.yaml (change it there)" in words
    assert "missing fraud_check" in words
    await browser.get("/rules/no-such-rule", 404)
    await browser.get("/rules/Not%20an%20id", 400)


async def test_a_rule_for_all_tenants(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "common.yaml").write_text("rules:\n  - {id: common, condition: bypass}\n")
    folders = {"directory": str(tmp_path / "rules"), "all_tenants_directory": str(shared)}
    async with broken(tmp_path, rules=folders) as browser:
        assert "for all tenants" in text_of(await browser.get("/rules"))
        page = await browser.get("/rules/common")
        assert "which the operator changes" in page
        assert "/rule-editor" not in page
        page = await browser.get(f"/signals/{signal_id(browser, 'common')}")
        assert "<mark>bypass</mark>" in page


async def test_a_rule_that_changed_or_is_gone(tmp_path):
    rule = {"condition": "never { bypass }", "severity": "high"}
    async with browsing(tmp_path, "rules: []\n") as browser:
        tools, client = browser.service.tools, browser.client
        await client.put("/api/v1/rules/mine", json=rule)
        await send(browser.service, [S(1, "bypass", bytes([5] * 16))])
        await closed(browser.service)
        path = f"/signals/{signal_id(browser, 'mine')}"
        assert "<mark>bypass</mark>" in await browser.get(path)
        changed = {**rule, "condition": "never { something.else }"}
        await client.put("/api/v1/rules/mine", json=changed, headers={"if-match": "*"})
        page = await browser.get(path)
        assert "the version that was broken" in page
        assert "<mark>bypass</mark>" in page
        assert "something.else" in await browser.get("/rules/mine")
        await client.delete("/api/v1/rules/mine", headers={"if-match": "*"})
        page = await browser.get(path)
        assert "(deleted)" in page
        assert "<mark>bypass</mark>" in page
        assert isinstance(tools.sources.rules, RuleStore)


async def test_a_hand_written_rule_that_changed(tmp_path):
    async with broken(tmp_path) as browser:
        path = f"/signals/{signal_id(browser)}"
        file = tmp_path / "rules/default/rules.yaml"
        file.write_text(RULES.replace("1000", "2000"))
        await browser.service.reload_rules()
        page = await browser.get(path)
        assert "this is its text of today" in page
        assert "<mark>" not in page
        file.write_text("rules: []\n")
        await browser.service.reload_rules()
        page = await browser.get(path)
        assert "this version is not kept" in page
        assert "missing" in page


async def test_a_signal_that_was_retracted(browser):
    raised = signal_id(browser)
    await send(browser.service, [S(4, "fraud_check", TRACE, 40, 50, 2, "bank")])
    await closed(browser.service)
    found, _ = browser.service.store.signals("default", SignalFilter(rule="fraud-check"))
    (retraction,) = [each.signal.id for each in found if each.signal.id != raised]
    page = await browser.get(f"/signals/{retraction}")
    assert "no longer broken" in text_of(page)
    assert "<mark>" not in page
    assert 'class="broken"' not in page
    page = await browser.get(f"/signals/{raised}")
    assert 'class="state retracted"' in page
    assert "<mark>fraud_check</mark>" in page


async def test_a_rule_with_groups(tmp_path):
    rules = """\
rules:
  - id: once
    condition: |
      for each pay by .x as p
      always { count(p) < 2 }
"""
    pays = [S(k, "pay", TRACE, x="17" if k < 4 else "18") for k in range(1, 5)]
    async with browsing(tmp_path, rules) as browser:
        await send(browser.service, pays)
        await closed(browser.service)
        page = await browser.get(f"/signals/{signal_id(browser, 'once')}")
        words = text_of(page)
        assert "Broken by 1 of 2 groups" in words
        assert "x = 17" in words
        assert "<mark>count(p) &lt; 2</mark>" in page
        assert len(re.findall('<li class="marked', page)) >= 3
        assert "How it is decided" in await browser.get("/rules/once")


async def test_a_signal_whose_trace_is_gone(tmp_path, browser):
    old = replace(make_signal(), detected_at=NOW - 3600 * SECOND)
    browser.service.store.write_signals("default", [old])
    page = await browser.get(f"/signals/{make_signal().id}")
    assert "no longer in the span log" in page
    assert "deleted" in page


async def test_nothing_yet(tmp_path):
    async with browsing(tmp_path, "rules: []\n") as browser:
        for path in ("/", "/signals", "/traces", "/rules"):
            assert 'class="empty"' in await browser.get(path)
        await browser.get("/signals/" + "0" * 32, 404)
        assert "there is no signal" in browser.page


@pytest.mark.parametrize(
    "path", ["/", "/signals", "/traces", "/rules", "/rule-editor", "/sign-in", "/signals/x"]
)
async def test_every_page_has_the_headers(browser, path):
    await browser.get(path, 400 if path == "/signals/x" else 200)
    for name, value in HEADERS.items():
        assert browser.headers[name] == value
    assert "unsafe" not in browser.headers["content-security-policy"]
    assert "<style" not in browser.page
    assert " style=" not in browser.page
    assert "://" not in browser.page.replace("http://www.w3.org", "")
    assert not re.search(r"<script(?! type=\"module\" src=)", browser.page)
    assert not re.search(r"\son\w+=", browser.page)


async def test_a_wrong_address_is_a_page_for_people_only(browser):
    page = await browser.get("/nothing", 404, accept="text/html,*/*")
    assert "there is nothing at /nothing" in page
    assert "<h1>Not found</h1>" in page
    assert browser.headers["content-security-policy"]
    assert '"code":"not_found"' in await browser.get("/nothing", 404)


async def test_signals_in_the_api_link_to_their_pages(tmp_path):
    shown = {"address": "off", "public_url": "https://betrace.example/"}
    async with broken(tmp_path, api=shown) as browser:
        signal = signal_id(browser)
        url = f"https://betrace.example/signals/{signal}"
        for path in (
            f"/api/v1/signals/{signal}",
            f"/api/v1/traces/{TRACE.hex()}",
            "/api/v1/signals",
        ):
            assert f'"url":"{url}"' in await browser.get(path)
        assert browser.service.settings.api.page_url("/", "acme").endswith("/?tenant=acme")
    async with broken(tmp_path / "other") as browser:
        assert '"url"' not in await browser.get("/api/v1/signals")


async def test_assets_are_kept_and_complete(browser):
    page = await browser.get("/")
    for path in re.findall(r'"(/assets/[^"]+)"', page):
        await browser.get(path)
        assert "immutable" in browser.headers["cache-control"]
    await browser.get("/assets/old/pages.css", 404)
    await browser.get(f"/assets/{ASSETS.version}/none.css", 404)
    css = ASSETS.files["pages.css"][0]
    assert b"url(" not in css
    assert b"@import" not in css


def test_invisible_characters_are_shown():
    assert shown("a\u202eb\x00\u200b") == "a\\u202eb\\x00\\u200b"
    assert shown("grün\n\t日本") == "grün\n\t日本"
    assert [took(k * 10**9) for k in (90, 150, 9000, 400_000, 2**33)] == [
        "90 s",
        "2.5 min",
        "2.5 h",
        "4.63 d",
        "99,420 d",
    ]
    assert utc(0) == "1970-01-01 00:00:00.000"


LATE = {"flush_ms": 600_000, "flush_most_seconds": 600}
"""Settings of DuckDB with which nothing is stored before the service ends."""


async def test_a_signal_that_is_not_stored_yet_has_its_page(tmp_path):
    async with browsing(tmp_path, duckdb=LATE) as browser:
        await send(browser.service, [S(1, "bypass", TRACE, service="shop")])
        with trio.fail_after(60):
            while not ledger_signals(browser.service):
                await trio.sleep(0.01)
            (signal,) = ledger_signals(browser.service)
            while browser.service.tools.unstored.find("default", signal.id) is None:
                await trio.sleep(0.01)
        assert browser.service.store.signal("default", signal.id) is None
        words = text_of(await browser.get(f"/signals/{signal.id}"))
        assert "active" in words
        assert "bypass" in words
        fields = {"note": "looking", "by": "ann"}
        await browser.post(f"/signals/{signal.id}/acknowledge", fields)
        assert "by ann" in text_of(await browser.get(f"/signals/{signal.id}"))
        await browser.get(f"/traces/{TRACE.hex()}")


async def test_a_trace_that_is_being_stored_is_waited_for(browser, monkeypatch):
    signal = signal_id(browser)
    monkeypatch.setattr(type(browser.service.tools.reader), "trace", lambda *_: None)
    monkeypatch.setattr(signals, "STORED_WITHIN", 3600 * SECOND)
    trace = f"/traces/{TRACE.hex()}"
    for path in (trace, f"{trace}/spans/{2:016x}"):
        page = await browser.get(path, 202)
        assert "The trace is being stored" in text_of(page)
        assert '<noscript><meta http-equiv="refresh"' in page
    page = await browser.get(f"/signals/{signal}")
    assert "The trace is being stored" in text_of(page)
    assert "past retention" not in page
    await browser.get(f"/traces/{bytes(16).hex()}", 404)
    monkeypatch.setattr(signals, "STORED_WITHIN", 0)
    await browser.get(trace, 404)
    assert "past retention" in await browser.get(f"/signals/{signal}")


async def test_undecided_traces_are_listed_with_their_reasons(browser):
    assert "undecided" not in (await browser.get("/rules/no-bypass")).lower()
    assert "every trace was judged" in await browser.get("/undecided")
    records = [
        UndecidedTrace(f"{n:032x}", "no-bypass", "v", f"<b>too long</b> {n}", time.time_ns())
        for n in range(60)
    ]
    browser.service.tools.undecided.add("default", records)
    assert "/undecided" in (await browser.get("/") and browser.links("/undecided"))
    await browser.get("/rules/no-bypass")
    (link,) = browser.links("/undecided?rule=no-bypass")
    page = await browser.get(link)
    assert "&lt;b&gt;too long&lt;/b&gt; 59" in page
    assert f"/traces/{59:032x}?rule=no-bypass" in browser.links("/traces/")
    (older,) = [each for each in browser.links("/undecided?") if "cursor=" in each]
    assert "too long&lt;/b&gt; 9<" in await browser.get(older)
    assert "every trace was judged" in await browser.get("/undecided?rule=fraud-check")


async def test_browsers_find_an_icon_for_pages_that_are_not_html(browser):
    assert "<svg" in await browser.get("/favicon.ico")
    assert browser.headers["content-type"].startswith("image/svg+xml")
