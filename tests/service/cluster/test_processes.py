"""A cluster of real processes and a real NATS server: spans go in at the edge, and signals come out
at the query node."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import ExitStack

import httpx
import pytest
from click.testing import CliRunner

from betrace.service.cli.main import cli
from betrace.service.storage.paths import tenant_directory
from tests.support.cluster_processes import Cluster
from tests.support.process import ANSWER_SECONDS, RULES, wait_for
from tests.support.spans import S, body

pytestmark = pytest.mark.slow

WAIT = 120  # seconds
_numbers = itertools.count()


@pytest.fixture
def cluster(server, tmp_path):
    made = Cluster(tmp_path, server.settings(prefix=f"processes{next(_numbers)}", lease_seconds=1))
    made.init()
    return made


def loop(number):
    """A trace that breaks the rule `too-many-spans`, and its id."""
    trace = number.to_bytes(8, "big") * 2
    return body(*(S(k, "loop", trace=trace) for k in range(1, 6))), trace.hex()


def signals(node, trace_id):
    return wait_for(lambda: node.signals(trace_id), WAIT)


def send(node, number):
    data, trace_id = loop(number)

    def accepted():
        return node.send(data).status_code == 200

    wait_for(accepted, WAIT)
    return trace_id


def rules_are_known(node):
    """Wait until the partitions' owners have taken the rules over: each has read a marker."""

    def known():
        partitions = node.get("/api/cluster").json()["partitions"]
        return all((each["counts"] or {}).get("markers") for each in partitions)

    wait_for(known, WAIT)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """One process with all roles, which forgets closed traces soon; and its cluster."""
    folder = tmp_path_factory.mktemp("whole")
    made = Cluster(folder, server.settings(prefix="whole"))
    made.init()
    options = {
        "traces__idle_seconds": "0.5",
        "caches__trace_metadata_ttl_seconds": "1",
        "caches__trace_metadata": "1",
    }
    with made.running("edge,evaluator,query", "all", **options) as node:
        rules_are_known(node)
        yield node, made


def test_one_process_with_all_roles(whole):
    node, _ = whole
    trace_id = send(node, 1)
    [signal] = signals(node, trace_id)
    assert signal["rule_id"] == "too-many-spans"
    trace = node.trace(trace_id)
    assert (trace["spans"], trace["missing"]) == (5, 0)
    spans = [s for r in trace["resourceSpans"] for k in r["scopeSpans"] for s in k["spans"]]
    assert len(spans) == 5
    assert trace["verdicts"]["too-many-spans"]["verdict"] == "breach"
    metrics = node.samples(node.metrics)
    assert metrics["betrace_span_ingestion_total"] >= 5
    assert metrics['betrace_cluster_node_info{node="all",roles="edge,evaluator,query"}'] == 1
    assert {"cluster", "edge", "evaluator"} <= node.ready(node.api)["components"].keys()


def test_an_open_trace_is_shown_by_its_evaluator(whole):
    node, _ = whole
    trace = (6).to_bytes(8, "big") * 2
    ids = itertools.count(1)

    def is_open():
        node.send(body(S(next(ids), "step", trace=trace)))
        found = node.get(f"/api/v1/traces/{trace.hex()}")
        return found.status_code == 200 and found.json()["state"] == "open" and found.json()

    found = wait_for(is_open, WAIT)
    assert found["resourceSpans"]
    assert found["missing"] == 0


def test_late_spans_of_a_trace_that_left_memory(whole):
    node, _ = whole
    numbers = itertools.count(100)

    def read_back():
        """Send a trace in two parts; whether the first one was read back from the log."""
        trace = next(numbers).to_bytes(8, "big") * 2
        node.send(body(*(S(k, "loop", trace=trace) for k in (1, 2))))
        node.trace(trace.hex())  # is closed
        for _ in range(16):  # so long it stays in memory; others make the log's time advance
            others = [next(numbers).to_bytes(8, "big") * 2 for _ in range(8)]
            node.send(body(*(S(1, "other", trace=each) for each in others)))
            time.sleep(0.5)
        node.send(body(*(S(k, "loop", trace=trace) for k in (3, 4))))
        [signal] = signals(node, trace.hex())
        assert signal["counts"] == {"loop": 4}
        return node.get("/api/cluster").json()["index"]["requests"]

    wait_for(read_back, WAIT)


def test_an_undeployed_rule_is_replayed_over_the_history(whole, tmp_path):
    node, cluster = whole
    trace_id = send(node, 900)
    signals(node, trace_id)
    rules = tmp_path / "new.yaml"
    rules.write_text("rules:\n  - id: new\n    condition: 'never { loop }'\n")
    config, data = str(cluster.config("all")), str(cluster.data("all"))
    arguments = ["replay", "--config", config, "--rules", str(rules)]
    done = CliRunner().invoke(cli, [*arguments, "--dry-run", "--json"])
    assert done.exit_code == 1, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["rule_id"] for each in found} == {"new"}
    assert trace_id in {each["trace_id"] for each in found}
    done = CliRunner().invoke(cli, [*arguments, "--data", data])
    assert done.exit_code == 3
    assert "cannot be recorded while the service runs" in done.output


def test_edges_are_paused_and_resumed(whole):
    node, _ = whole
    data, _ = loop(901)

    def act(action):
        url = f"{node.api}/api/admin/pipeline/{action}"
        return httpx.post(url, timeout=ANSWER_SECONDS, trust_env=False)

    drained = act("drain?wait=60")
    assert (drained.status_code, drained.json()["ingestion"]) == (200, "paused"), drained.text
    assert drained.json()["drained"] is True
    assert "paused" in wait_for(lambda: (a := node.send(data)).status_code == 503 and a.text, WAIT)
    assert act("resume").json()["ingestion"] == "open"
    send(node, 901)


def test_a_backup_is_restored_to_a_new_cluster(whole, server, tmp_path):
    node, cluster = whole
    trace_id = send(node, 902)
    signals(node, trace_id)

    def betrace(*arguments):
        done = CliRunner().invoke(cli, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.stdout

    copy, first = tmp_path / "copy", cluster.config("all")
    betrace("backup", copy, "--config", first, "--data", cluster.data("all"))
    again = betrace("restore", copy, "--config", first, "--data", tmp_path / "again")
    assert "This is the cluster of the backup" in again
    other = Cluster(tmp_path, server.settings(prefix="restored"))
    other.init()
    told = betrace("restore", copy, "--config", other.config("new"), "--data", other.data("new"))
    assert "keys of the old one" in told
    other.rules("new")
    with other.running("edge,evaluator,query", "new", traces__idle_seconds="0.5") as restored:
        assert signals(restored, trace_id)
        assert signals(restored, send(restored, 903))


def test_rules_that_change_apply_to_new_traces(whole):
    node, cluster = whole
    cluster.rules("all", RULES.replace('count("loop") > 3', 'count("loop") > 1'))

    def broken():
        number = next(_numbers) + 1000
        trace = number.to_bytes(8, "big") * 2
        node.send(body(S(1, "loop", trace=trace), S(2, "loop", trace=trace)))
        return wait_for(lambda: node.trace(trace.hex()), WAIT)["signals"]

    wait_for(broken, WAIT)


def test_a_drained_process_exits_cleanly(whole):
    node, _ = whole
    assert node.stop() == 0


def test_a_process_for_each_role(cluster):
    with ExitStack() as stack:
        evaluator = stack.enter_context(cluster.running("evaluator", "evaluator-1"))
        edge = stack.enter_context(cluster.running("edge", "edge-1"))
        first = send(edge, 1)  # before any rules are published
        query = stack.enter_context(cluster.running("query", "query-1"))
        assert query.ingest == evaluator.ingest == "None"
        [signal] = signals(query, first)
        for node, role in ((evaluator, "evaluator"), (edge, "edge")):
            ready = node.ready(node.api)
            assert ready["status"] == "ready"
            assert ready["node"] == f"{role}-1"
            assert ready["components"][role]["status"] == "ok"
            name = f'betrace_cluster_node_info{{node="{role}-1",roles="{role}"}}'
            assert node.samples(node.metrics)[name] == 1
            assert "query node" in node.get("/api/v1/signals").text
        assert edge.samples(edge.api)["betrace_span_ingestion_total"] == 5
        query.trace(first)  # is closed

        # The query node loses DuckDB while it is stopped, and meanwhile more is decided.
        query.kill()
        second = send(edge, 2)
        data = cluster.data("query-1")
        (tenant_directory(data, "default") / "betrace.duckdb").unlink()
        with cluster.running("query", "query-1") as again:
            assert signals(again, first) == [signal]
            signals(again, second)
            assert again.trace(first)["spans"] == 5
            assert again.stop() == 0
        assert edge.stop() == 0
        assert evaluator.stop() == 0
