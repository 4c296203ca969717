"""A real Prometheus scrapes the service while the demo shop sends spans."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest

from betrace.service.cli.demo.ports import free_port
from tests.support.grafana_files import FOLDER, alerts, queries, titles_in
from tests.support.process import Running, environment, running, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not on PATH (Debian: prometheus)"
    ),
]

WITHOUT_TROUBLE = {  # without data in normal operation, and the demo causes no failures
    "Spans refused, by reason",
    "Requests refused, by reason",
    "Fallbacks: time to write",
    "Compared with the day before",
}
AT_TIMES = {  # only if a stage has input during a scrape
    "Stages: without progress",
}


class Prometheus:
    """The HTTP API of Prometheus."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, trust_env=False, timeout=60)

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the answer's ``data``, or None."""
        try:
            answer = self._client.get(f"/api/v1/{path}", params=parameters)
        except httpx.TransportError:
            return None
        if answer.status_code == 503:  # it is listening but not answering yet
            return None
        found = answer.json()
        assert found["status"] == "success", f"{parameters}: {found}"
        return found["data"]

    def values(self, query: str) -> list[float]:
        """Return the current values of a query."""
        found = self.ask("query", query=query)
        values = [float(each["value"][1]) for each in found["result"]] if found else []
        return [value for value in values if not math.isnan(value)]

    def close(self) -> None:
        self._client.close()


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Run a process until the end of the block."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def scraping(directory: Path, service: Running) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes the service once a second."""
    directory.mkdir()
    target = service.metrics.removeprefix("http://")
    config = directory / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{FOLDER / 'alerts.yaml'}']\n"
        "scrape_configs:\n"
        "  - job_name: betrace\n"
        f"    static_configs: [{{targets: ['{target}']}}]\n"
    )
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    command.append("--enable-feature=exemplar-storage")
    log = directory / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    with ended(process):
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        try:
            wait_for(lambda: prometheus.values("up == 1"), 180)
            yield prometheus
        finally:
            prometheus.close()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the shop for a while and continues."""
    directory = tmp_path_factory.mktemp("scraped")
    with resources.as_file(resources.files("betrace.service.cli.demo").joinpath("rules")) as rules:
        shutil.copytree(rules, directory / "rules")
    with running(directory) as service, scraping(directory / "prometheus", service) as prometheus:
        command = [
            sys.executable,
            "-m",
            "betrace.service.cli.demo.shop",
            "--endpoint",
            service.ingest,
        ]
        # First, every scenario once: counted from 0, it is visible as an increase.
        subprocess.run([*command, "--once"], env=environment(), check=True, timeout=180)
        shop = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        with ended(shop):
            wait_for(lambda: prometheus.values("betrace_duckdb_rows_total > 20"), 180)
            wait_for(lambda: prometheus.values("count_over_time(up[1m]) > 15"), 180)
            yield prometheus
        assert service.stop() == 0


def test_each_panel_has_data_under_the_demos_load(prometheus: Prometheus) -> None:
    data = {title: 0 for title, _ in queries()}
    for title, query in queries():
        data[title] += len(prometheus.values(query))  # an invalid query is an error in any case
    empty = {title for title, number in data.items() if not number}
    assert empty - AT_TIMES - set(titles_in("Cluster")) == WITHOUT_TROUBLE


def test_the_rules_are_evaluated_and_do_not_fire_in_normal_operation(
    prometheus: Prometheus,
) -> None:
    def evaluated() -> list[Any] | None:
        (group,) = prometheus.ask("rules")["groups"]
        done = all(rule["health"] != "unknown" for rule in group["rules"])
        return list(group["rules"]) if done else None

    rules = wait_for(evaluated)
    assert {rule["name"] for rule in rules} == {alert["alert"] for alert in alerts()}
    for rule in rules:
        assert rule["health"] == "ok", rule
        if not rule["name"].startswith("BetraceRule"):  # the shop breaks rules
            assert rule["state"] != "firing", rule


def test_no_label_is_unbounded(prometheus: Prometheus) -> None:
    names = set(prometheus.ask("labels"))
    assert not names & {"trace_id", "rule_id", "span_id", "service"}
    labelled = prometheus.ask("series", **{"match[]": '{tenant!="", __name__!~"ALERTS.*"}'})
    by_rule = {"betrace_rule_signals_total", "betrace_rule_evaluations_total"}
    assert {each["__name__"] for each in labelled} == by_rule
    (series,) = prometheus.values('count({job="betrace"})')
    assert series < 1000


def test_signals_have_exemplars(prometheus: Prometheus) -> None:
    def found() -> list[Any]:
        query = "betrace_rule_signals_total"
        window = {"start": str(time.time() - 600), "end": str(time.time())}
        return prometheus.ask("query_exemplars", query=query, **window) or []

    series = wait_for(found)
    for each in series:
        for exemplar in each["exemplars"]:
            assert len(exemplar["labels"]["trace_id"]) == 32
    assert {each["seriesLabels"]["tenant"] for each in series} == {"default"}
