"""Roles of a process: what the command line accepts, and health and metrics without a query
node."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import orjson
import pytest
from click.testing import CliRunner
from prometheus_client.core import GaugeMetricFamily

from betrace.service.app.roles import Role, RoleError, kernels_of, read_roles
from betrace.service.app.status import NodeStatus, StatusApp
from betrace.service.cli.main import cli
from betrace.service.config.settings import Settings
from betrace.service.pipeline.warmup import PARTS
from betrace.service.tenancy.authentication import OperatorTokens
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate

CLUSTER = "[cluster]\npartitions = 2\n"


def test_roles_are_read_in_their_order():
    assert read_roles(" query,edge ", True) == (Role.EDGE, Role.QUERY)
    assert read_roles(None, False) == ()


@pytest.mark.parametrize(
    ("text", "clustered", "message"),
    [
        (None, True, "say what this process does with --role"),
        (" , ", True, "say what this process does with --role"),
        ("edge", False, "there is no section \\[cluster\\]"),
        ("edge,boss", True, "'boss' is no role; roles are edge, evaluator, query"),
    ],
)
def test_roles_and_the_section_cluster_belong_together(text, clustered, message):
    with pytest.raises(RoleError, match=message):
        read_roles(text, clustered)


def test_all_roles_together_need_all_kernels():
    assert set(kernels_of(list(Role))) == set(PARTS)
    assert kernels_of([Role.EVALUATOR, Role.QUERY]) == ("relations", "traces")


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (CLUSTER, ["serve"], "say what this process does with --role"),
        ("", ["serve", "--role", "edge"], "there is no section [cluster]"),
        (CLUSTER, ["backup", "x", "--data", "x"], "edges and evaluators keep nothing"),
        (
            f"{CLUSTER}[retention]\nlog_days = 1\n[traces]\nmax_age_seconds = 50_000\n",
            ["serve", "--role", "evaluator"],
            "retention.log_days (1) is less than twice traces.max_age_seconds (50000)",
        ),
    ],
)
def test_what_does_not_work_yet_is_refused(tmp_path, config, arguments, message):
    path = tmp_path / "config.toml"
    path.write_text(config)
    done = CliRunner().invoke(cli, [*arguments, "--config", str(path)])
    assert done.exit_code == 3
    assert message in done.output


def test_a_service_without_a_cluster_imports_nothing_of_it():
    script = (
        "import sys, betrace.service.app.builder, betrace.service.cli.serve\n"
        "extra = [m for m in sys.modules if m.partition('.')[0] == 'nats' "
        "or m.startswith('betrace.service.cluster')]\n"
        "assert not extra, extra"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


class Asked:
    """A status application, and a client."""

    def __init__(self, state="ready", authenticator=None):
        def metrics():
            yield GaugeMetricFamily("betrace_test", "A test.", 5)

        parts = {"edge": {"status": "ok", "detail": "open"}}
        roles = ("edge", "evaluator")
        self.app = StatusApp(
            NodeStatus("edge-1", roles, lambda: state, lambda: parts, metrics, authenticator)
        )

    async def get(self, path, method="GET", headers=()):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            raise AssertionError("nothing is read")

        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await self.app(scope, receive, send)
        self.app.close()
        return sent[0]["status"], sent[1]["body"]


async def test_health_names_the_node():
    status, body = await Asked().get("/readyz")
    assert status == 200
    assert orjson.loads(body) == {
        "status": "ready",
        "node": "edge-1",
        "roles": ["edge", "evaluator"],
        "components": {"edge": {"status": "ok", "detail": "open"}},
    }
    assert await Asked("starting").get("/livez") == (200, b'{"status":"ok"}')
    status, body = await Asked("draining").get("/readyz")
    assert status == 503
    assert orjson.loads(body)["status"] == "not ready"


async def test_metrics_are_those_of_the_parts_and_of_the_process():
    status, body = await Asked().get("/metrics")
    assert status == 200
    lines = body.decode().splitlines()
    assert "betrace_test 5.0" in lines
    assert 'betrace_cluster_node_info{node="edge-1",roles="edge,evaluator"} 1.0' in lines
    assert any(line.startswith("process_cpu_seconds_total") for line in lines)


async def test_metrics_need_the_scrape_token_with_authentication(tmp_path):
    settings = Settings(storage={"path": tmp_path}, auth={"scrape_token": "s" * 32})
    with closing(TenantDirectory(tmp_path / "tenants.sqlite")) as directory:
        gate = Gate(settings, directory, OperatorTokens("o" * 32), None)
        for token, status in ((b"s", 200), (b"x", 403), (b"", 401)):
            header = (b"authorization", b"Bearer " + token * 32)
            asked = Asked(authenticator=gate.authenticator)
            assert (await asked.get("/metrics", headers=[header] * bool(token)))[0] == status
            assert (await Asked(authenticator=gate.authenticator).get("/readyz"))[0] == 200
        gate.close()


async def test_other_paths_point_to_a_query_node():
    status, body = await Asked().get("/api/v1/signals")
    assert status == 404
    assert b"ask a query node" in body
    assert (await Asked().get("/metrics", "POST"))[0] == 405


async def test_other_protocols_are_refused():
    app, sent = Asked().app, []

    async def send(message):
        sent.append(message)

    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive():
        return next(messages)

    await app({"type": "lifespan"}, receive, send)
    await app({"type": "websocket"}, receive, send)
    assert [each["type"] for each in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
        "websocket.close",
    ]
