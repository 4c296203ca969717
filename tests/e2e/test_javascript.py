"""Traces of the real JavaScript SDK: its exporters for JSON and for protobuf, and over
gRPC, from npm; and its SDK for the web in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import Running, running, wait_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("compression", ["", "gzip"])
@pytest.mark.parametrize("kind", ["json", "proto", "grpc"])
def test_a_trace_from_javascript(
    service: Running, folder: Path, kind: str, compression: str
) -> None:
    url = service.grpc if kind == "grpc" else f"{service.ingest}/v1/traces"
    sent = subprocess.run(
        ["node", "send.mjs", url, kind, compression],
        cwd=folder,
        capture_output=True,
        timeout=60,
        text=True,
    )
    assert sent.returncode == 0, sent.stderr
    ids = json.loads(sent.stdout)
    (signal,) = wait_for(lambda: service.signals(ids["trace_id"]))
    assert signal["rule_id"] == "fraud-check"
    assert signal["evidence"] == {"payment.charge_card.where(amount > 1000)": [ids["span_ids"][1]]}
    trace = service.trace(ids["trace_id"])
    spans = {
        span["spanId"]: span
        for resource in trace["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    }
    root, payment = (spans[span_id] for span_id in ids["span_ids"])
    assert payment["parentSpanId"] == root["spanId"]
    assert payment["events"][0]["name"] == "declined"
    attributes = {a["key"]: a["value"] for a in root["attributes"]}
    assert attributes["customer"] == {"stringValue": "Zoë"}
    assert attributes["big.number"] == {"intValue": "9007199254740991"}
    assert sorted(trace["services"]) == ["bank", "shop"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def origin(folder: Path) -> Iterator[str]:
    """Where the page is served: another origin than the service."""
    made = subprocess.run(
        ["node_modules/.bin/esbuild", "page.mjs", "--bundle", "--outfile=www/page.js"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (folder / "www" / "index.html").write_text(
        "<!doctype html><title>shop</title><p id=said>sending</p><script src=page.js></script>"
    )
    handler = functools.partial(Quiet, directory=str(folder / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def visit(page: str, profile: Path) -> str:
    """The page after its script has run, in Chromium without a window."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--no-first-run"]
    options += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([chromium, *options, page], capture_output=True, timeout=90, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    return shown.stdout


def test_a_page_sends_its_spans(tmp_path: Path, origin: str) -> None:
    with running(tmp_path, ingest__cors_origins=json.dumps([origin])) as service:
        page = visit(f"{origin}/?{service.ingest}/v1/traces", tmp_path / "profile")
        assert 'id="said">sent ' in page, page
        trace_id = page.partition('id="said">sent ')[2][:32]
        (signal,) = wait_for(lambda: service.signals(trace_id))
        assert signal["rule_id"] == "fraud-check"
        assert service.trace(trace_id)["services"] == ["page"]


def test_a_page_of_another_origin_is_told_in_the_log(
    service: Running, tmp_path: Path, origin: str
) -> None:
    page = visit(f"{origin}/?{service.ingest}/v1/traces", tmp_path / "profile")
    assert 'id="said">failed' in page
    wanted = f"pages of {origin} may not send here; add it to ingest.cors_origins"
    wait_for(lambda: any(wanted in line for line in service.log))
