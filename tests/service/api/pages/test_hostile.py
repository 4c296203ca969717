"""Names and values that attack the reader: markup, scripts, reordered text, and too much of it."""

from __future__ import annotations

import re

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.api.pages.spans import MOST_ATTRIBUTES, MOST_ROWS
from tests.service.api.pages.conftest import TRACE, broken, browsing, signal_id
from tests.support.inprocess import closed, request, send, submit
from tests.support.spans import S

SCRIPT = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}{% raw %}"
REVERSED = "safe\u202egnp.exe\u2066\u200f"


def attacking_body(attributes=10_000):
    """A span whose every text is an attack, with many attributes."""
    sent = ExportTraceServiceRequest()
    resource_spans = sent.resource_spans.add()
    resource_spans.resource.attributes.add(key="service.name").value.string_value = QUOTES
    resource_spans.resource.attributes.add(key=SCRIPT).value.string_value = SCRIPT
    scope_spans = resource_spans.scope_spans.add()
    scope_spans.scope.name = SCRIPT
    span = scope_spans.spans.add(
        trace_id=TRACE,
        span_id=b"\1" * 8,
        parent_span_id=b"\2" * 8,
        name="bypass",
        start_time_unix_nano=1,
        end_time_unix_nano=2**63 - 1,
    )
    scope_spans.spans.add(trace_id=TRACE, span_id=b"\3" * 8, name=SCRIPT, end_time_unix_nano=2**63)
    span.status.code = 2
    span.status.message = SCRIPT + REVERSED
    span.kind = 99
    event = span.events.add(name=SCRIPT)
    event.attributes.add(key=QUOTES).value.string_value = QUOTES
    link = span.links.add(trace_id=TRACE, span_id=b"\3" * 8)
    link.attributes.add(key=SCRIPT).value.bytes_value = b"\0\xff"
    for k in range(60):
        span.events.add(name=f"event {k}")
    values = span.attributes
    values.add(key="reversed").value.string_value = REVERSED
    values.add(key=QUOTES).value.string_value = SCRIPT
    values.add(key="long").value.string_value = "x" * 100_000
    values.add(key="number").value.int_value = 2**63 - 1
    values.add(key="double").value.double_value = float("nan")
    values.add(key="yes").value.bool_value = True
    values.add(key="none")
    array = values.add(key="array").value.array_value
    array.values.add().string_value = SCRIPT
    pair = values.add(key="map").value.kvlist_value.values.add(key=SCRIPT)
    pair.value.int_value = 3
    for k in range(attributes):
        values.add(key=f"a{k}").value.int_value = k
    return sent.SerializeToString()


async def test_everything_is_escaped_and_cut(tmp_path):
    async with browsing(tmp_path) as browser:
        await submit(browser.service, request(attacking_body()))
        await closed(browser.service)
        signal = signal_id(browser, "no-bypass")
        for path in (f"/signals/{signal}", f"/traces/{TRACE.hex()}", "/traces", "/signals", "/"):
            page = await browser.get(path)
            assert "<script>" not in page
            assert "<img" not in page
            assert not re.search("[\u200f\u202e\u2066]", page)
            assert len(page) < 300_000
        page = await browser.get(f"/signals/{signal}")
        assert "&lt;script&gt;alert(1)" in page
        assert "{{ 7 * 7 }}" in page
        assert "safe\\u202egnp.exe" in page
        assert f"{10_009 - MOST_ATTRIBUTES:,} more attributes" in page
        assert "whole value" in page
        assert "9223372036854775807" in page
        assert "Shortened." in page
        whole = await browser.get(f"/traces/{TRACE.hex()}/spans/{'01' * 8}")
        assert "x" * 100_000 in whole
        assert "a9999" in whole
        assert browser.headers["content-type"] == "application/json"


async def test_a_long_trace_is_shown_in_parts(tmp_path):
    count = MOST_ROWS * 2 + 50
    spans = [S(1, "root", TRACE, 0, 10_000, 0)]
    spans += [S(k, "step", TRACE, k, k + 5, 1) for k in range(2, count)]
    spans += [S(count, "bypass", TRACE, count, count + 1, 1)]
    async with broken(tmp_path, *spans) as browser:
        page = await browser.get(f"/signals/{signal_id(browser, 'no-bypass')}")
        rows = re.findall('<li class="[^"]*" id="s-', page)
        assert len(rows) == 50
        assert 'class="marked' in page  # the part with the span that broke the rule
        assert "600 spans before" in page
        page = await browser.get(f"/traces/{TRACE.hex()}")
        assert len(re.findall('<li class="[^"]*" id="s-', page)) == MOST_ROWS
        (after,) = [link for link in browser.links("/traces/") if "from=300" in link]
        page = await browser.get(after.partition("#")[0])
        assert len(re.findall('<li class="[^"]*" id="s-', page)) == MOST_ROWS
        await browser.get(f"/traces/{TRACE.hex()}?from=99999")


async def test_addresses_that_attack(browser):
    for path in (
        "/signals/%3Cscript%3E",
        "/traces/..%2f..%2fetc",
        "/signals?rule=%3Cscript%3Ealert(1)%3C/script%3E",
        "/signals?cursor=%00%ff",
        f"/traces/{TRACE.hex()}?span=%3Cscript%3E",
        f"/traces/{TRACE.hex()}?rule=%3Cscript%3E",
        "/traces?service=%3Cscript%3E",
        "/?tenant=%3Cscript%3E",
        "/rules/%22onload=",
        "/nothing?%3Cscript%3E",
        "/rule-editor?id=%3Cscript%3E",
        "/sign-in?next=%3Cscript%3E",
    ):
        answer = await browser.client.get(path)
        page = await answer.get_data(as_text=True)
        assert answer.status_code in (200, 400, 404), path
        assert "<script>" not in page, path


async def test_a_rule_whose_texts_attack(tmp_path):
    rules = f"""\
rules:
  - id: bad
    name: "{SCRIPT}: missing: \\u202e"
    description: "{SCRIPT}"
    labels: {{"{SCRIPT}": "{SCRIPT}"}}
    condition: 'never {{ "{SCRIPT}".where("{SCRIPT}" == 1) or bypass }}'
"""
    async with browsing(tmp_path, rules) as browser:
        await send(browser.service, [S(1, "bypass", TRACE)])
        await closed(browser.service)
        paths = ("/", "/signals", "/rules", "/rules/bad", f"/signals/{signal_id(browser, 'bad')}")
        for path in (*paths, f"/traces/{TRACE.hex()}", "/rule-editor"):
            page = await browser.get(path)
            assert "<script>" not in page
            assert "\u202e" not in page
