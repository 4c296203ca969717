"""``betrace signals``, ``traces`` and ``trace`` on a service that answers as the API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner, Result

from betrace.service.cli import signals as module
from betrace.service.cli.main import cli
from betrace.service.cli.traces import _summary as summary
from betrace.service.cli.waterfall import MAX_SPANS, waterfall
from betrace.service.otlp.span_tree import in_tree_order
from betrace.service.times import short_duration
from tests.support import tui_records as records

Query = dict[str, str]


class Service:
    """Answers the queries for signals and traces, in pages, and records what was asked."""

    def __init__(self) -> None:
        self.signals = [records.signal(number) for number in range(5, 0, -1)]
        self.streams: list[list[dict[str, Any]]] = []
        self.asked: list[tuple[str, Query, str | None]] = []
        self.changes: list[tuple[str, str, Any, str | None]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                service.asked.append((url.path, query, self.headers.get("x-scope-orgid")))
                if url.path.endswith("/stream"):
                    if not service.streams:
                        body: Any = {"error": {"message": "it stops", "hint": "wait"}}
                        return self._send(503, json.dumps(body).encode())
                    events = service.streams.pop(0)
                    lines = "".join(f"event: signal\ndata: {json.dumps(e)}\n\n" for e in events)
                    return self._send(200, f": still here\n\n{lines}".encode())
                found = service.find(url.path, query)
                body = found or {"error": {"message": "there is no such signal", "hint": ""}}
                return self._send(200 if found else 404, json.dumps(body).encode())

            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
                who = self.headers.get("x-operator")
                service.changes.append((self.command, self.path, body, who))
                if "missing" in self.path:
                    return self._send(404, b'{"error": {"message": "no rule", "hint": "look"}}')
                answer = {"until": "2025-01-31T12:00:00.000000000Z", "by": who}
                return self._send(200, json.dumps(answer).encode())

            do_POST = do_PUT

            def do_DELETE(self) -> None:
                service.changes.append((self.command, self.path, None, None))
                return self._send(404 if "missing" in self.path else 204, b"")

            def _send(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def find(self, path: str, query: Query) -> Any:
        after, limit = int(query.get("cursor", 0)), int(query.get("limit", 100))
        following = str(after + limit) if after + limit < len(self.signals) else None
        match path.removeprefix("/api/v1"):
            case "/signals":
                return {"signals": self.signals[after : after + limit], "next": following}
            case "/traces":
                return {"traces": [records.row()], "next": None, "searched_to": None}
            case found if found == f"/traces/{records.TRACE}":
                return {**records.row(), **records.trace(), "signals": self.signals[:1]}
        return None


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


def run(service: Service, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [*arguments, "--url", service.url], env={"COLUMNS": "100"})
    assert result.exit_code == code, result.output
    return result


def test_signals_are_a_table(service: Service) -> None:
    lines = run(service, "signals").stdout.splitlines()
    assert lines[0].split() == [
        "DETECTED",
        "SEVERITY",
        "STATUS",
        "SERVICE",
        "RULE",
        "TRACE",
        "WHAT",
    ]
    assert len(lines) == 6
    assert lines[1].split()[:6] == [
        "2023-11-14T22:13:25Z",
        "critical",
        "active",
        "frontend",
        "fraud-check",
        records.TRACE,
    ]
    assert lines[1].endswith("missing: fraud_check (5)")


def test_signals_are_filtered_by_the_service(service: Service) -> None:
    arguments = ("--rule", "r", "--severity", "high", "--status", "active", "--tenant", "acme")
    run(service, "signals", *arguments, "--since", "2025-01-31T12:00:00Z")
    path, query, tenant = service.asked[0]
    since = str(1738324800 * 10**9)
    assert path == "/api/v1/signals"
    assert query == {
        "rule": "r",
        "severity": "high",
        "status": "active",
        "since": since,
        "limit": "100",
    }
    assert tenant == "acme"


def test_signals_as_json_over_several_pages(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    assert json.loads(run(service, "signals", "--json").stdout) == service.signals
    result = run(service, "signals", "--limit", "3")
    assert len(result.stdout.splitlines()) == 4
    assert "there are more" in result.stderr


def test_muted_and_acknowledged_signals_are_marked(service: Service) -> None:
    service.signals[0] |= {"muted": True, "acknowledged": {"by": "ann"}}
    service.signals[1] |= {"muted": False, "acknowledged": None}
    _, first, second, *_ = run(service, "signals").stdout.splitlines()
    assert "  active (muted) ✓  frontend  fraud-check" in first
    assert "✓" not in second
    assert "muted" not in second


def test_signals_of_shadow_rules_are_marked_and_filtered(service: Service) -> None:
    service.signals[0] |= {"mode": "shadow"}
    service.signals[1] |= {"mode": "alert"}
    _, first, second, *_ = run(service, "signals", "--mode", "shadow").stdout.splitlines()
    assert service.asked[0][1]["mode"] == "shadow"
    assert "  active (shadow)  frontend  fraud-check" in first
    assert "shadow" not in second
    run(service, "signals", "--mode", "loud", code=2)


def test_signals_are_filtered_by_the_service_of_their_trace(service: Service) -> None:
    del service.signals[0]["service"]  # of an older version
    _, first, *_ = run(service, "signals", "--service", "bank").stdout.splitlines()
    assert service.asked[0][1]["service"] == "bank"
    assert "  active  -         fraud-check" in first


def test_a_rule_is_muted_and_unmuted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    result = run(service, "rules", "mute", "r/1", "--for", "2h", "--reason", "known")
    assert result.stdout == "r/1 is muted until 2025-01-31T12:00:00Z\n"
    body = {"for": "2h", "reason": "known"}
    assert service.changes.pop() == ("PUT", "/api/v1/rules/r%2F1/mute", body, "ann")
    assert run(service, "rules", "unmute", "r").stdout == "r is no longer muted\n"
    assert service.changes.pop()[:2] == ("DELETE", "/api/v1/rules/r/mute")
    assert "is not muted" in run(service, "rules", "unmute", "missing", code=1).stderr
    refused = run(service, "rules", "mute", "missing", "--for", "1h", "--reason", "x", code=3)
    assert refused.stderr == "betrace: no rule; look\n"


def test_a_signal_is_acknowledged(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "a nn")  # not a name for X-Operator
    run(service, "acknowledge", "ab", "--note", "on it", "--json")
    change = ("POST", "/api/v1/signals/ab/acknowledge", {"note": "on it"}, None)
    assert service.changes == [change]


def test_no_signals(service: Service) -> None:
    service.signals = []
    assert run(service, "signals").stdout == "no signals\n"
    assert json.loads(run(service, "signals", "--json").stdout) == []


def test_following_continues_after_a_lost_connection(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh(number: int, **more: Any) -> dict[str, Any]:
        found = records.signal(number, **more)
        del found["status"]
        return found

    service.streams = [
        [fresh(5), fresh(6), fresh(7, kind="retracted")],  # the 5th is in the list as well
        [fresh(6), fresh(8)],
    ]
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    result = run(service, "signals", "--follow", "--json", "--status", "active")
    seen = [int(json.loads(line)["id"], 16) for line in result.stdout.splitlines()]
    assert seen == [1, 2, 3, 4, 5, 6, 8]
    assert pauses == [1.0, 1.0, 2.0, 4.0]
    assert "it stops; wait" in result.stderr
    lists = [query for path, query, _ in service.asked if path == "/api/v1/signals"]
    assert lists[0]["limit"] == str(module.LATEST)
    assert lists[1]["since"] == records.signal(6)["detected_at"]


def test_following_a_service_that_refuses(service: Service) -> None:
    result = run(service, "signals", "--follow", code=3)
    assert result.stderr == "betrace: it stops; wait\n"


def test_followed_signals_are_columns(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.streams = [[]]
    monkeypatch.setattr(module.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    head, *rows = run(service, "signals", "--follow").stdout.splitlines()
    assert len(rows) == 5
    assert {row.index(records.TRACE) for row in rows} == {head.index("TRACE")}


def test_traces_are_a_table(service: Service) -> None:
    options = ("--service", "a", "--min-duration", "1s", "--broken", "--limit", "5")
    head, row = run(service, "traces", *options).stdout.splitlines()
    assert head.split() == ["START", "DURATION", "SPANS", "ERRORS", "TRACE", "ROOT"]
    assert row.split() == [
        *("2023-11-14T22:13:20Z", "120", "ms", "4", "1", records.TRACE),
        *("frontend", "POST", "/checkout"),
    ]
    assert service.asked[0][1] == {
        "service": "a",
        "min_duration": "1s",
        "has_signal": "true",
        "limit": "5",
    }
    assert json.loads(run(service, "traces", "--json").stdout) == [records.row()]


def test_a_trace_is_a_waterfall_with_its_signals(service: Service) -> None:
    lines = run(service, "trace", records.TRACE).stdout.splitlines()
    assert lines[0].startswith(f"trace {records.TRACE}  closed, 4 spans, 1 error, 120 ms, from 20")
    assert lines[1].startswith("● critical  fraud-check  Payments over 1000")
    assert lines.pop(2) == f"  signal {5:032x}"
    starts = ["  POST /checkout ", "    order ", "◆     charge ", "        ✖ attempt "]
    for line, start in zip(lines[3:], starts, strict=True):
        assert line.startswith(start)
    assert "frontend" in lines[3]
    assert lines[3].endswith("█")
    assert max(map(len, lines[3:])) <= 100
    assert lines[6].index("█") > lines[5].index("█") > lines[4].index("█") > lines[3].index("█")
    assert json.loads(run(service, "trace", records.TRACE, "--json").stdout)["spans"] == 4


def test_an_incomplete_trace_says_so() -> None:
    lines = summary({**records.trace(), **records.row(), "missing_parents": 2, "state": "closed"})
    assert lines[1:] == ["✖ the trace is incomplete: 2 parents never came"]


def test_a_trace_that_does_not_exist(service: Service) -> None:
    result = run(service, "trace", "f" * 32, code=3)
    assert "there is no trace ffff" in result.stderr
    assert "is not a trace id" in run(service, "trace", "f" * 31, code=2).stderr


def test_a_waterfall_of_hostile_spans() -> None:
    spans = [records.span(f"{n:016x}", f"{n - 1:016x}", "x\x1b[31m" * 40, n, n) for n in range(50)]
    cycle = [records.span("c1", "c2", "a", 0, 1), records.span("c2", "c1", "b", 1, 2)]
    trace = {"resourceSpans": [records.of_service("s" * 300, *spans, *cycle)]}
    for width in (20, 80, 200):
        lines = [line.text for line in waterfall(trace, (), width)]
        assert len(lines) == 52
        assert "\x1b" not in "".join(lines)
        assert max(map(len, lines)) <= max(width, 62)
    many = [records.span(f"{n:016x}", "", "a", 0, 1) for n in range(MAX_SPANS + 5)]
    *_, last = waterfall({"resourceSpans": [records.of_service("s", *many)]}, (), 80)
    assert last.text == "… and 5 more; see all with --json"
    assert list(waterfall({"resourceSpans": []}, (), 80)) == []
    assert in_tree_order([]) == []


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_500, "1.5 µs"),
        (12_345_678, "12.3 ms"),
        (999_600_000, "1000 ms"),
        (90 * 10**9, "90 s"),
        (12345 * 10**9, "12345 s"),
    ],
)
def test_durations(ns: int, text: str) -> None:
    assert short_duration(ns) == text
