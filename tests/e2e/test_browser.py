"""The pages in a real Chromium: from an alert to the span, at both widths, light and dark, with the
keyboard, without JavaScript, signed in, attacked, and under load."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.api.pages.test_hostile import attacking_body
from tests.support.chromium import SCHEMES, WIDTHS, accessibility, chromium, fits, visiting
from tests.support.http_receiver import Receiver, receiving
from tests.support.process import Running, running, wait_for
from tests.support.spans import S, body

pytestmark = pytest.mark.slow

PUBLIC = "http://pages.example"
OPERATOR = "operator-token-of-the-tests"
TRACE = bytes(range(100, 116))
RULES = """\
rules:
  - id: fraud-check
    name: Payments over 1000 are checked for fraud
    severity: critical
    labels: {team: payments}
    condition: |
      when   { payment.charge_card.where(x > 1000) }
      always { payment.fraud_check }
      never  { payment.skipped }
  - id: no-bypass
    name: Nobody bypasses the checks
    condition: bypass
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def hook() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, hook: Receiver) -> Iterator[Running]:
    """A service with a trace that breaks a rule, and another that attacks its readers."""
    directory = tmp_path_factory.mktemp("shop")
    (directory / "rules").mkdir()
    (directory / "rules/shop.yaml").write_text(RULES)
    options = {"api__public_url": PUBLIC, "alerts__webhook__url": hook.url}
    with running(directory, **options) as service:
        assert service.send(payment(TRACE)).status_code == 200
        assert service.send(attacking_body()).status_code == 200
        service.trace(TRACE.hex())
        yield service


def payment(trace: bytes) -> bytes:
    now = time.time_ns()
    ms = 1_000_000
    return body(
        S(1, "POST /checkout", trace, now, now + 90 * ms, 0, "frontend"),
        S(2, "payment.charge_card", trace, now + 20 * ms, now + 70 * ms, 1, "payment", x="1899"),
        S(3, "payment.attempt", trace, now + 30 * ms, now + 40 * ms, 2, "payment", error=True),
        S(4, "payment.attempt", trace, now + 45 * ms, now + 60 * ms, 2, "payment"),
    )


def signal_of(service: Running, trace: bytes = TRACE) -> dict[str, Any]:
    (signal,) = wait_for(lambda: service.signals(trace.hex()))
    return signal


def link_of_the_alert(hook: Receiver) -> str | None:
    for alert in hook.alerts():
        if alert["labels"]["alertname"] == "fraud-check":
            return str(alert["generatorURL"])
    return None


def test_from_an_alert_to_the_span_and_the_line_in_two_clicks(
    browser: Any, shop: Running, hook: Receiver
) -> None:
    link = wait_for(lambda: link_of_the_alert(hook), 60)
    assert link == signal_of(shop)["url"]
    assert link.startswith(PUBLIC)
    with visiting(browser) as page:
        page.goto(shop.api + link.removeprefix(PUBLIC))  # the first click, in the alert
        assert page.locator("h1").inner_text() == "Payments over 1000 are checked for fraud"
        assert page.locator(".broke").inner_text().lower() == "missing payment.fraud_check"
        line = page.locator("tr.hit")
        assert line.locator("mark").inner_text() == "payment.fraud_check"
        assert line.locator("th").inner_text() == "2"
        assert in_window(page, line)
        page.locator(".evidence a").first.click()  # the second click
        panel = page.locator("#span")
        panel.get_by_text("1899").wait_for()
        assert "payment.charge_card" in panel.inner_text()
        assert in_window(page, panel.get_by_text("1899"))
        assert page.locator(".rows li.marked").count() == 1


def in_window(page: Any, element: Any) -> bool:
    """Whether the element comes into the window, once the page has stopped changing."""

    def seen() -> bool:
        box = element.bounding_box()  # None while the page replaces it
        return box is not None and 0 <= box["y"] < page.viewport_size["height"]

    return wait_for(seen)


def paths(service: Running) -> list[str]:
    signal = signal_of(service)
    return [
        "/",
        "/signals",
        f"/signals/{signal['id']}",
        "/traces",
        f"/traces/{signal['trace_id']}?span={3:016x}",
        "/rules",
        "/rules/fraud-check",
        "/undecided",
        "/rule-editor",
        "/sign-in",
        "/signals/" + "0" * 32,
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_is_accessible_and_fits(
    browser: Any, shop: Running, width: int, scheme: str
) -> None:
    with visiting(browser, width, scheme, bypass_csp=True) as page:
        for path in paths(shop)[:-1]:
            page.goto(shop.api + path)
            assert fits(page), path
            for summary in page.locator(".action > summary").all():
                summary.click()
            assert accessibility(page) == [], path


def test_lists_follow_the_signals(browser: Any, shop: Running) -> None:
    with visiting(browser) as page:
        for path in ("/", "/signals"):
            with page.expect_response(lambda answer: answer.url.endswith("/live")) as stream:
                page.goto(shop.api + path)
            assert stream.value.status == 200
            trace = os.urandom(16)
            assert shop.send(payment(trace)).status_code == 200
            (signal,) = wait_for(lambda trace=trace: shop.signals(trace.hex()), 60)
            page.locator(f'.signals a[href*="/signals/{signal["id"]}"]').wait_for()


def test_what_attacks_stays_text(browser: Any, shop: Running) -> None:
    trace = bytes(range(1, 17))
    found = wait_for(lambda: shop.signals(trace.hex()))
    wait_for(lambda: shop.trace(trace.hex()))  # a trace is stored a little later than its signals
    for width in WIDTHS:
        with visiting(browser, width) as page:
            for path in ("/", "/signals", "/traces", f"/signals/{found[0]['id']}"):
                page.goto(shop.api + path)
                assert fits(page), path
            assert "<script>alert(1)</script>" in page.locator("#span").inner_text()
            assert page.locator("main img, main script").count() == 0
            page.get_by_role("link", name="more attributes").click()
            page.wait_for_url("**/spans/*")


def test_with_the_keyboard_alone(browser: Any, shop: Running) -> None:
    with visiting(browser) as page:
        page.goto(f"{shop.api}/traces/{TRACE.hex()}")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        row = page.locator(f'.rows a[data-span="{2:016x}"]')
        for _ in range(40):
            page.keyboard.press("Tab")
            if row.evaluate("each => each === document.activeElement"):
                break
        else:
            pytest.fail("the row cannot be reached with Tab")
        assert row.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
        page.keyboard.press("ArrowDown")
        page.locator("#span", has_text=f"{3:016x}").wait_for()
        page.keyboard.press("ArrowUp")
        page.locator("#span", has_text="1899").wait_for()
        page.goto(f"{shop.api}/signals/{signal_of(shop)['id']}")
        summary = page.locator("summary", has_text="Acknowledge")
        summary.focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.type("with the keyboard")
        page.keyboard.press("Tab")
        page.keyboard.type("ann")
        page.keyboard.press("Enter")
        page.get_by_text("Acknowledged by ann").wait_for()
    assert signal_of(shop)["acknowledged"]["note"] == "with the keyboard"


def test_without_javascript(browser: Any, shop: Running) -> None:
    with visiting(browser, 375, java_script_enabled=False) as page:
        page.goto(shop.api + "/")
        page.get_by_role("link", name="Payments over 1000").last.click()
        page.locator("tr.hit").wait_for()
        page.locator(f'.rows a[data-span="{3:016x}"]').click()
        page.wait_for_url(f"**span={3:016x}*")
        assert "error" in page.locator("#span").inner_text()
        page.locator("summary", has_text="Mute the rule").click()
        page.get_by_label("Reason").fill("a deployment")
        page.get_by_role("button", name="Mute").click()
        page.get_by_text("a deployment").wait_for()
        page.get_by_role("button", name="End the mute").click()
        page.locator("summary", has_text="Mute the rule").wait_for()


def test_lists_stay_current(browser: Any, shop: Running) -> None:
    with visiting(browser) as page:
        page.goto(shop.api + "/signals?rule=fraud-check")
        before = page.locator(".signals li").count()
        assert shop.send(payment(bytes(range(50, 66)))).status_code == 200
        page.locator(".signals li").nth(before).wait_for()


def test_a_rule_is_checked_while_it_is_typed(browser: Any, shop: Running) -> None:
    with visiting(browser) as page:
        page.goto(shop.api + "/rule-editor")
        page.get_by_label("Condition").press_sequentially("never { bypass")
        page.locator("#checked pre", has_text="^").wait_for()
        page.get_by_label("Condition").press_sequentially(" }")
        page.locator("#checked .good").wait_for()
        page.get_by_label("Id", exact=True).fill("typed")
        page.get_by_role("button", name="Save").click()
        page.wait_for_url("**/rules/typed")


def test_signing_in(browser: Any, tmp_path: Path) -> None:
    auth = {"auth__enabled": "true", "auth__operator_token": OPERATOR}
    with running(tmp_path, **auth) as service, visiting(browser, 375) as page:
        page.goto(service.api + "/rules?severity=high")
        page.get_by_label("Token").fill(OPERATOR)
        page.keyboard.press("Enter")
        page.wait_for_url("**/rules?severity=high")
        assert page.evaluate("document.cookie") == ""
        (cookie,) = [each for each in page.context.cookies() if each["name"] == "betrace_session"]
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/sign-in")


def test_pages_answer_while_spans_pour_in(browser: Any, shop: Running) -> None:
    stop = threading.Event()
    sent = []

    def pour() -> None:
        k = 0
        while not stop.is_set():
            k += 1
            spans = [S(n + 1, "step", k.to_bytes(16, "big")) for n in range(500)]
            sent.append(shop.send(body(*spans)).status_code)

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        with visiting(browser) as page:
            for path in paths(shop)[:6]:
                assert page.goto(shop.api + path).status == 200
                assert page.locator("h1").count() == 1
    finally:
        stop.set()
        thread.join()
    assert sent
    assert set(sent) <= {200, 429, 503}
