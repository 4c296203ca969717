"""The demo and its shop, and that it notices unexpected results."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.app.service import Addresses
from betrace.service.cli.demo import run as demo
from betrace.service.cli.demo import shop as demo_shop
from betrace.service.cli.demo.shop_process import free_address
from betrace.service.cli.main import cli
from betrace.service.cli.rules import check_files
from betrace.service.otlp.encoding import decode_body
from betrace.service.rules.yaml_file import load_file
from tests.support.loggers import restored

RULES = Path(demo.__file__).parent / "rules"


def betrace(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["demo", *arguments])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with restored():
        yield


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A server that accepts traces, and its requests."""
    requests: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            encoding = self.headers.get("content-encoding", "")
            requests.append(
                ExportTraceServiceRequest.FromString(decode_body(body, encoding, 1 << 20))
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


# The shop


@pytest.mark.slow
def test_the_shop_propagates_its_traces(collector: Any, capsys: Any) -> None:
    url, requests = collector
    demo_shop.main(["--endpoint", url, "--once"])
    sent = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["scenario"] for line in sent] == list(demo_shop.SCENARIOS)
    services = defaultdict(set)
    spans = defaultdict(dict)
    for request in requests:
        for resource in request.resource_spans:
            (service,) = (
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    trace_id = span.trace_id.hex()
                    services[trace_id].add(service)
                    spans[trace_id][span.span_id] = span
    assert spans.keys() == {line["trace_id"] for line in sent}
    for line in sent:
        found = spans[line["trace_id"]]
        roots = [span for span in found.values() if not span.parent_span_id]
        assert len(roots) == 1
        assert all(s.parent_span_id in found for s in found.values() if s is not roots[0])
        assert len(services[line["trace_id"]]) >= 2
    alerted = next(s for s in sent if s["scenario"].endswith("an alert is raised"))
    assert len(services[alerted["trace_id"]]) == len(demo_shop.SERVICES)


def test_every_rule_is_broken_by_a_scenario_and_kept_by_another() -> None:
    rules = {rule.id for path in RULES.glob("*.yaml") for rule in load_file(path)}
    broken = [expected for _, expected in demo_shop.SCENARIOS.values()]
    assert rules == frozenset().union(*broken)
    assert not check_files([RULES]).problems
    assert broken.count(frozenset()) >= 3


# The demo


@pytest.mark.slow
def test_once_finds_the_expected_signals() -> None:
    result = betrace("--once")
    assert result.exit_code == 0, result.output
    printed = result.stdout
    expected = sum(len(rules) for _, rules in demo_shop.SCENARIOS.values())
    count = len(demo_shop.SCENARIOS)
    assert f"{count} traces, {expected} of {expected} expected signals found: all as" in printed
    assert "critical payment-fraud-check  trace " in printed
    assert [line[:4] for line in printed.splitlines()].count("ok  ") == count


@pytest.mark.slow
def test_once_reports_missing_and_unexpected_signals(monkeypatch: Any) -> None:
    scenarios = {
        "buys a book": (demo_shop.SCENARIOS["buys a book"][0], frozenset({"slow-checkout"})),
        "buys a laptop, and nobody checks for fraud": (
            demo_shop.SCENARIOS["buys a laptop, and nobody checks for fraud"][0],
            frozenset(),
        ),
    }
    # The shop's own process has the real scenarios; only what is expected is another.
    real = demo_shop.SCENARIOS
    monkeypatch.setattr(demo_shop, "SCENARIOS", real | scenarios)
    monkeypatch.setattr(demo, "ONCE_SECONDS", 12.0)
    result = betrace("--once", "--json")
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["unexpected"] == 1
    assert report["found"] == report["expected"] - 1
    wrong = [trace for trace in report["traces"] if not trace["ok"]]
    assert [(t["scenario"], t["expected"], t["found"]) for t in wrong] == [
        ("buys a book", ["slow-checkout"], []),
        ("buys a laptop, and nobody checks for fraud", [], ["payment-fraud-check"]),
    ]
    assert "some expected signals were missing after 12 s" in result.stderr


@pytest.mark.slow
def test_it_prints_signals_until_ctrl_c(monkeypatch: Any) -> None:
    found = []
    real = demo._Demo._print_signal

    def print_signal(self: Any, printed: Any) -> None:
        real(self, printed)
        found.append(printed)
        if len(found) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(demo._Demo, "_print_signal", print_signal)
    result = betrace("--json", "--ingest", "127.0.0.1:0", "--api", "127.0.0.1:0")
    assert result.exit_code == 0, result.output
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert printed == found
    assert {printed["kind"] for printed in printed} == {"raised"}
    assert "where to look next" in result.stderr


def test_default_ports_are_used_if_they_are_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert free_address(address) == "127.0.0.1:0"
    assert free_address(address) == address


@pytest.mark.parametrize(
    ("api", "line"),
    [
        ("http://127.0.0.1:8090", "  the TUI   betrace tui"),
        ("http://127.0.0.1:99", "  the TUI   betrace tui --url http://127.0.0.1:99"),
    ],
)
def test_it_says_how_to_start_the_tui(api: str, line: str, capsys: Any) -> None:
    shown = demo._Demo(once=False, as_json=False)
    shown._addresses = Addresses(ingest="http://127.0.0.1:4318", grpc=None, api=api, metrics=None)
    shown._say_where_to_look()
    assert line in capsys.readouterr().out.splitlines()


def test_a_failing_shop_is_reported(monkeypatch: Any) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    result = betrace("--once")
    assert result.exit_code == 3
    assert "the sample shop failed with exit code 1" in result.stderr


@pytest.mark.parametrize("option", ["--api", "--ingest"])
def test_it_needs_both_listeners(option: str) -> None:
    result = betrace(option, "off")
    assert result.exit_code == 3
    assert "the demo needs both listeners" in result.stderr
