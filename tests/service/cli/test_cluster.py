"""betrace cluster, and what doctor finds in a cluster, on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from betrace.service.cli.common import with_client
from betrace.service.cli.demo.ports import free_port
from betrace.service.cli.doctor.checks import diagnose
from betrace.service.cli.doctor.cluster import server_finding, stream_findings
from betrace.service.cli.doctor.finding import FAILED, NOTE, OK, WARNING
from betrace.service.cli.main import cli
from betrace.service.cluster.lease_keys import lease_key
from betrace.service.cluster.output import Counts, Output, pack
from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.generations import Finished, finished_key
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.leases import Leases
from betrace.service.storage.jetstream.spans import SpanStreams
from betrace.service.storage.jetstream.survey import ReplicaState, ServerState, StreamState
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers

LEASE = "0.5"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers


@pytest.fixture
def environment(servers: NatsServers, request: pytest.FixtureRequest) -> dict[str, str]:
    """A cluster of its own for each test."""
    values = {
        "servers": servers.urls,
        "prefix": f"c{abs(hash(request.node.name))}",
        "partitions": "2",
        "replicas": "1",
        "lease_seconds": LEASE,
        "heartbeat_seconds": "0.1",
        "monitoring_port": str(servers.servers[0].monitor),
    }
    return {f"BETRACE_CLUSTER__{name.upper()}": value for name, value in values.items()}


def run(environment: dict[str, str], *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["cluster", *arguments], env=environment)


def of_cluster(environment: dict[str, str]) -> ClusterSettings:
    return ClusterSettings(
        **{name.removeprefix("BETRACE_CLUSTER__").lower(): v for name, v in environment.items()}  # type: ignore[arg-type]
    )


def test_a_command_without_a_cluster_says_what_to_do() -> None:
    result = run({}, "status")
    assert result.exit_code == 3
    assert "no [cluster] section in the defaults" in result.stderr


def test_servers_that_are_away_are_named() -> None:
    port = free_port()
    environment = {
        "BETRACE_CLUSTER__SERVERS": f"nats://127.0.0.1:{port}",
        "BETRACE_CLUSTER__CONNECT_SECONDS": "0.2",
    }
    result = run(environment, "init")
    assert result.exit_code == 3
    assert f"127.0.0.1:{port}" in result.stderr
    assert "check that the NATS servers run" in result.stderr


def test_init_creates_once(environment: dict[str, str]) -> None:
    first = run(environment, "init")
    assert first.exit_code == 0, first.output
    assert "SPANS-1" in first.stdout
    assert "is ready" in first.stdout
    assert run(environment, "init").stdout == "all is well\n"
    assert json.loads(run(environment, "init", "--json").stdout) == {"done": []}
    other = environment | {"BETRACE_CLUSTER__PARTITIONS": "3"}
    result = run(other, "init")
    assert result.exit_code == 0
    assert "2 partitions; cluster.partitions = 3 in the configuration is ignored" in result.stdout


def test_resize_asks_and_shows_the_progress(environment: dict[str, str]) -> None:
    missing = run(environment, "resize", "--partitions", "4")
    assert missing.exit_code == 3
    assert "run: betrace cluster init" in missing.stderr
    run(environment, "init")
    refused = run(environment, "resize", "--partitions", "3", "--yes")
    assert refused.exit_code == 3
    assert "can only be multiplied" in refused.stderr
    asked = run(environment, "resize", "--partitions", "4")
    assert asked.exit_code == 1
    assert "from 2 to 4 partitions" in asked.stdout
    begun = run(environment, "resize", "--partitions", "4", "--yes", "--wait", "0s")
    assert begun.exit_code == 1, begun.output
    assert "created 8 streams" in begun.stdout
    assert "0 of 2 former partitions are finished" in begun.stdout
    assert "not finished: 0, 1" in begun.stdout
    found = json.loads(run(environment, "status", "--json").stdout)
    assert found["generations"] == [{"first": 0, "count": 2}, {"first": 2, "count": 4}]
    assert [each["partition"] for each in found["partitions"]] == list(range(6))
    assert any("change to 4 partitions is under way" in each for each in found["problems"])

    settings = of_cluster(environment)

    async def finish(client: NatsClient) -> None:
        config = ConfigBucket(client, Layout.of(settings).config_bucket)
        for partition in range(2):
            await config.put(finished_key(partition), Finished(1, 1).to_json())

    with_client(settings, finish)
    done = run(environment, "resize", "--partitions", "4")
    assert done.exit_code == 0, done.output
    assert "2 of 2 former partitions are finished" in done.stdout
    assert done.stdout.endswith("has 4 partitions\n")
    assert "spans go to the partitions 2 to 5; former: 0 to 1" in run(environment, "status").stdout


def test_status_before_init(environment: dict[str, str]) -> None:
    result = run(environment, "status")
    assert result.exit_code == 3
    assert "run: betrace cluster init" in result.stderr


def test_status_shows_nodes_owners_and_lag(environment: dict[str, str]) -> None:
    run(environment, "init")
    settings = of_cluster(environment)
    layout = Layout.of(settings)

    async def main() -> None:
        client = await NatsClient.connect(settings, "test")
        try:
            members = ConfigBucket(client, layout.members_bucket)
            beat: dict[str, Any] = {"roles": ["evaluator"], "draining": False, "boot": "x"}
            await members.put("beat.node1", json.dumps(beat).encode())
            await members.put("drain.node1", b"")
            leases = Leases(ConfigBucket(client, layout.leases_bucket), 2)
            await leases.acquire(lease_key(0), "node1")
            log = SpanStreams(client, layout)
            for number in range(5):
                await log.append(0, b"x", f"a{number}")
            out = FencedLog(client, layout, 0)
            await out.open("node0")
            await out.open("node1")
            (message,) = pack(Output(3, 1, 0, 0, Counts()))
            await out.append(message)
            garbage = FencedLog(client, layout, 1)
            await garbage.open("node1")
            await garbage.append(b"garbage")
        finally:
            await client.close()

    trio.run(main)
    result = run(environment, "status", "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["nodes"] == [
        {"name": "node1", "roles": ["evaluator"], "alive": False, "draining": True}
    ]
    first, second = found["partitions"]
    assert (first["owner"], first["epoch"], first["lag"], first["messages"]) == ("node1", 2, 2, 5)
    assert (second["owner"], second["epoch"], second["lag"]) == ("", 1, None)
    assert first["replicas"] == 1
    problems = "\n".join(found["problems"])
    assert "node node1 shows no heartbeat" in problems
    assert "partitions without owner: 1" in problems
    table = run(environment, "status").stdout
    for text in ("node1", "no heartbeat", "n0, n0", "without owner"):
        assert text in table


# doctor


def findings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, data: Path) -> list[Any]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = diagnose(None, {"storage.path": str(data)}).findings
    return [each for each in found if each.check == "cluster"]


def test_doctor_says_nothing_without_a_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert findings({}, monkeypatch, tmp_path) == []


def test_doctor_looks_at_servers_and_streams(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = findings(environment, monkeypatch, tmp_path)
    assert any(each.status == FAILED and "cluster init" in each.remedy for each in before)
    run(environment, "init")
    found = findings(environment, monkeypatch, tmp_path)
    assert [each.status for each in found] == [OK, OK, NOTE, OK, OK], found
    text = "\n".join(each.found for each in found)
    for part in ("version 2.", "8.0 MiB", "syncs every write", "one server only", "9 streams"):
        assert part in text
    (unknown,) = (
        each
        for each in findings({"BETRACE_CLUSTER__MONITORING_PORT": "0"}, monkeypatch, tmp_path)
        if "sync" in each.found
    )
    assert unknown.status == NOTE


def test_doctor_warns_of_servers_that_do_not_sync(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"config": {"sync_interval": 120000000000}}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        environment["BETRACE_CLUSTER__MONITORING_PORT"] = str(server.server_port)
        found = findings(environment, monkeypatch, tmp_path)
        server.shutdown()
        thread.join()
    (sync,) = (each for each in found if "sync every" in each.found)
    assert sync.status == WARNING
    assert "sync_interval: always" in sync.remedy


def test_doctor_without_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    environment = {
        "BETRACE_CLUSTER__SERVERS": f"nats://127.0.0.1:{port}",
        "BETRACE_CLUSTER__CONNECT_SECONDS": "0.2",
    }
    found = findings(environment, monkeypatch, tmp_path)
    assert [each.status for each in found] == [WARNING, FAILED]
    assert "does not answer" in found[0].found


@pytest.mark.parametrize(
    ("server", "status", "text"),
    [
        (ServerState("a:1", "n", "2.12.3", 1 << 20, True), OK, "1.0 MiB"),
        (ServerState("a:1", "n", "2.12.2", 1 << 20, True), FAILED, "version 2.12.2"),
        (ServerState("a:1", "n", "2.12.3-RC.1", 1 << 20, True), OK, "2.12.3-RC.1"),
        (ServerState("a:1", "n", "2.15.1", 1 << 20, False), FAILED, "without JetStream"),
        (ServerState("a:1", "n", "2.15.1", 1000, True), FAILED, "1000 bytes"),
        (ServerState("a:1", error="it does not answer"), WARNING, "it does not answer"),
    ],
)
def test_doctor_judges_servers(server: ServerState, status: str, text: str) -> None:
    finding = server_finding(server)
    assert finding.status == status
    assert text in finding.found
    assert bool(finding.remedy) == (status != OK)


def test_doctor_judges_streams() -> None:
    followers = (ReplicaState("b", True, False, 0), ReplicaState("c", False, True, 9))
    good = StreamState("s", "a", followers[:1], {"num_replicas": 2}, 1, 1, 1, 0.1, 0.1)
    assert [each.status for each in stream_findings([good])] == [OK, OK]
    headless = replace(good, leader="")
    behind = replace(good, followers=followers, config={"num_replicas": 3})
    fast = replace(good, clock_difference=-7200.0)
    found = list(stream_findings([headless, behind, fast]))
    assert [each.status for each in found] == [FAILED, WARNING, WARNING]
    assert "differs by 7199.9 s" in found[2].found
