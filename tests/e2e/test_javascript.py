"""Traces sent by the JSON and protobuf exporters of the JavaScript SDK, from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.process import Running, wait_for

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent / "js"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and its packages."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("js")
    for name in ("package.json", "send.mjs"):
        shutil.copy(HERE / name, folder)
    try:
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=120,
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm install failed: {error.stderr.decode()[-300:]}")
    except subprocess.TimeoutExpired:
        pytest.skip("npm install took more than two minutes")
    return folder


@pytest.mark.parametrize("compression", ["", "gzip"])
@pytest.mark.parametrize("kind", ["json", "proto"])
def test_a_trace_from_javascript(
    service: Running, folder: Path, kind: str, compression: str
) -> None:
    sent = subprocess.run(
        ["node", "send.mjs", f"{service.ingest}/v1/traces", kind, compression],
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
