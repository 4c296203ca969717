"""The picture of the dashboard, drawn from a scripted Prometheus."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest

picture = pytest.importorskip("grafana.picture")


@pytest.fixture
def prometheus() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            result = []
            if "retracted" not in asked["query"][0]:  # that panel has no data
                start = float(asked["start"][0])
                values = [[start + 10 * number, f"{number}"] for number in range(10)]
                labels = {"tenant": "acme", "rule": "<b>&", "outcome": "kept"}
                result = [{"metric": labels, "values": [*values, [start + 200, "NaN"]]}]
            body = json.dumps({"status": "success", "data": {"result": result}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_rows_are_drawn_with_their_data(
    prometheus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["picture", "--url", prometheus, "--rows", "At a glance", "Rules"]
    monkeypatch.setattr("sys.argv", arguments)
    picture.main()
    drawn = ElementTree.fromstring(capsys.readouterr().out)
    texts = [each.text or "" for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Rules", "Top breaking rules", "Verdicts, by outcome", "No data"} <= set(texts)
    assert any(text.startswith("acme <b>&") for text in texts)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) > 3


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.5, "percentunit", "50 %"),
        (0.002, "s", "2 ms"),
        (3, "s", "3 s"),
        (2_500_000, "bytes", "2.5 MB"),
        (4, "cps", "4/s"),
        (1500, "short", "1.5 k"),
    ],
)
def test_values_are_short(value: float, unit: str, text: str) -> None:
    assert picture.shown(value, unit) == text
