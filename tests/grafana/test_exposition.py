"""Every metric used in a panel, an alert or a page is exposed by a running service."""

import re
import statistics
import threading
import time
from types import SimpleNamespace

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from betrace.channels import ThreadTimeout
from betrace.service.api.metrics import cluster, flow
from betrace.service.app import edge_metrics, evaluator_metrics
from betrace.service.cli.docs import metrics as metrics_docs
from betrace.service.cluster.edge.group_commit import GroupCommit
from betrace.service.cluster.evaluator.status import PartitionStatus, Phase
from betrace.service.pipeline.scanning import IngestCounts
from tests.support import inprocess
from tests.support.grafana_files import (
    FOLDER,
    ROOT,
    alerts,
    metrics_of,
    needs_promtool,
    promtool,
    queries,
)
from tests.support.spans import S


@pytest.fixture(scope="module")
def exposition(tmp_path_factory):
    """The metrics of a service that has raised a signal."""
    directory = tmp_path_factory.mktemp("exposition")
    inprocess.write_rules(directory, {"r": "never { a }"})

    async def main():
        async with inprocess.running(inprocess.settings(directory)) as service:
            await inprocess.send(service, [S(1), S(2)])
            await inprocess.closed(service)
            await service.recovery.save()
            return (await service.tools.exposition.scrape()).decode()

    return trio.run(main)


@pytest.fixture(scope="module")
def families(exposition):
    return list(text_string_to_metric_families(exposition))


def values_of(families):
    """Values by (name, labels)."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def samples(families):
    return values_of(families)


@pytest.fixture(scope="module")
def of_cluster():
    """The samples of an edge, an evaluator that owns a partition, and a query node."""

    async def main():
        commit = GroupCommit(None, 2, None, 1 << 20, 1 << 20)
        refusals = SimpleNamespace(spans={"quota": 0}, requests={"unavailable": 0})
        admission = SimpleNamespace(refusals=refusals, buffered_bytes=0)
        edge = edge_metrics.read(edge_metrics.EdgeState(IngestCounts(), admission, commit))
        evaluator = evaluator_metrics.read([PartitionStatus(0, Phase.CURRENT)])
        state = {"partition": 0, "applied": 5, "lag": 1}
        node = SimpleNamespace(
            name="query-1",
            roles=("query",),
            partitions=lambda: [state],
            items=lambda: {0: 3},
            index=SimpleNamespace(requests=2, behind=1),
            cluster=SimpleNamespace(
                duties=SimpleNamespace(held=lambda: {"alerts": True, "export-otlp": False})
            ),
        )
        query = [each.family(SimpleNamespace(node=node)) for each in cluster.DECLARED]
        return list(edge), list(evaluator), query

    return trio.run(main)


@pytest.fixture(scope="module")
def every_sample(samples, of_cluster):
    """The samples of the service and of a cluster."""
    return samples | values_of(family for families in of_cluster for family in families)


@pytest.fixture(scope="module")
def names(every_sample):
    return {name for name, _ in every_sample}


def test_metrics_of_panels_exist(names):
    missing = {title: metrics_of(query) - names for title, query in queries()}
    assert missing
    assert not any(missing.values()), missing


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_metrics_of_alerts_exist(names, alert):
    found = metrics_of(alert["expr"])
    assert found <= names
    assert found or alert["alert"] == "BetraceDown"  # uses Prometheus' own metric up


def test_label_values_in_panels_and_alerts_exist(every_sample):
    """A typo in a value would silence an alert for ever."""
    asked = {
        (metric, label, value)
        for query in [query for _, query in queries()] + [alert["expr"] for alert in alerts()]
        for metric, matchers in re.findall(r"(betrace_\w+)\{([^}]*)\}", query)
        for label, wanted in re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', matchers)
        for value in wanted.split("|")
        if label not in ("job", "instance")
    }
    exposed = {(name, label, value) for name, labels in every_sample for label, value in labels}
    assert ("betrace_circuit_breaker_state", "state", "half_open") in asked
    assert asked <= exposed, asked - exposed


def test_metrics_in_the_tests_of_alerts_exist(names):
    series = re.findall(r"series: (\w+)\{", (FOLDER / "alerts_test.yaml").read_text())
    assert series
    assert set(series) - {"up"} <= names


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_metrics_in_pages_exist(names, page):
    text = (ROOT / page).read_text("utf-8")
    named = set(re.findall(r"`((?:betrace|process|python)_[a-z_]+)[`{]", text))
    assert named <= names | {name.removesuffix("_bucket") for name in names}


def test_exposed_and_documented_metrics_are_the_same(families):
    documented = {
        metric.name: (metric.kind, metric.text)
        for metric in metrics_docs.service_metrics() + metrics_docs.process_metrics()
    }
    exposed = {
        f"{family.name}_total" if family.type == "counter" else family.name: (
            family.type,
            family.documentation,
        )
        for family in families
        if not family.name.endswith("_created")
    }
    assert exposed == documented


def test_metrics_of_edges_and_evaluators_are_documented(of_cluster):
    edge, evaluator, _ = of_cluster
    shared = {each.name for each in flow.ARRIVING}
    for families, documented in (
        (
            [family for family in edge if family.name not in shared],
            metrics_docs.edge_only_metrics(),
        ),
        (evaluator, metrics_docs.evaluator_only_metrics()),
    ):
        assert {each.name: (each.kind, each.text) for each in documented} == {
            f"{f.name}_total" if f.type == "counter" else f.name: (f.type, f.documentation)
            for f in families
        }
    known = {metric.name for metric in metrics_docs.service_metrics()}
    assert {each.exposed_name for each in flow.ARRIVING} <= known


def test_labels_are_as_documented(families):
    documented = {metric.name: set(metric.labels) for metric in metrics_docs.service_metrics()}
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        for sample in family.samples if name in documented else ():
            assert set(sample.labels) - {"le"} == documented[name], sample


def test_events_are_counted(samples):
    def value(name, **labels):
        return samples[name, tuple(sorted(labels.items()))]

    assert value("betrace_span_ingestion_total") == 2
    assert value("betrace_signals_total", severity="medium", kind="raised") == 1
    assert value("betrace_rule_evaluation_latency_seconds_count") >= 1
    assert value("betrace_cache_requests_total", cache="ruleContainers", result="miss") == 1
    assert value("betrace_checkpoint_timestamp_seconds") > value("betrace_start_time_seconds")
    assert value("betrace_checkpoint_bytes") > 0
    assert value("betrace_data_disk_bytes", state="free") > 0
    assert value("betrace_data_disk_bytes", state="used") > 0
    for stage in ("span-ingestion", "projection"):
        assert value("betrace_stage_stalled", stage=stage) == 0
    assert value("betrace_span_log_sync_failures_total") == 0


@needs_promtool
def test_promtool_accepts_the_metrics(exposition):
    promtool("check", "metrics", given=exposition.encode())


def test_all_three_caches_are_exposed(samples):
    caches = {"ruleContainers", "publicKeys", "traceMetadata"}
    for result in ("hit", "miss"):
        for cache in caches:
            labels = (("cache", cache), ("result", result))
            assert samples["betrace_cache_requests_total", labels] >= 0
    ratios = [dict(labels)["cache"] for name, labels in samples if name.endswith("hit_ratio")]
    assert set(ratios) == caches


@pytest.fixture(scope="module")
def scrapes(tmp_path_factory):
    """Scrapes of a service with 500 tenants: the number of tenants, durations of scrapes, how often
    the Trio thread ran meanwhile, and the number of series with 1 and with 500 tenants."""
    directory = tmp_path_factory.mktemp("tenants")
    inprocess.write_rules(directory, {"r": "never { a }"})
    settings = inprocess.settings(directory, traces={"idle_seconds": 600})
    took, beats, series = [], [], []
    beat = 0

    async def beating():
        nonlocal beat
        while True:
            await trio.sleep(0.001)
            beat += 1

    async def main():
        async with inprocess.running(settings, die=True) as service:
            for number in range(500):
                await inprocess.send(service, [S(1)], f"tenant-{number}")
                if number == 0:
                    series.append((await service.tools.exposition.scrape()).count(b"\n"))
            await inprocess.folded(service)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beating)
                for _ in range(40):
                    started, before = time.perf_counter(), beat
                    text = await service.tools.exposition.scrape()
                    took.append(time.perf_counter() - started)
                    beats.append(beat - before)
                    await trio.sleep(0.02)
                nursery.cancel_scope.cancel()
            series.append(text.count(b"\n"))
            return len(service.pipeline.open_traces.tenants)

    tenants = trio.run(main)
    scrape = 1000 * statistics.median(took)
    print(f"{tenants} tenants: {scrape:.1f} ms a scrape, the Trio thread ran {sum(beats)} times")
    return tenants, took, beats, series


def test_a_scrape_of_500_tenants_is_quick(scrapes):
    tenants, took, _, _ = scrapes
    assert tenants == 500
    assert statistics.median(took) < 1  # of a busy machine; it takes milliseconds


def test_a_scrape_does_not_delay_the_trio_thread(scrapes):
    """The Trio thread passes batches from stage to stage."""
    _, _, beats, _ = scrapes
    assert sum(beats) > len(beats) / 2


def test_the_number_of_series_does_not_grow_with_tenants(scrapes):
    _, _, _, (one, many) = scrapes
    assert many == one


async def test_a_hung_disk_delays_only_the_scrape(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(
        "betrace.service.api.metrics.stores.shutil.disk_usage", lambda _: release.wait(60) and 0
    )
    monkeypatch.setattr("betrace.service.api.metrics.exposition.SCRAPE_SECONDS", 0.2)
    async with inprocess.running(inprocess.settings(tmp_path)) as service:
        with pytest.raises(ThreadTimeout):
            await service.tools.exposition.scrape()
        with trio.fail_after(60):
            await inprocess.send(service, [S(1)])
            await inprocess.folded(service)
        monkeypatch.undo()
        release.set()
        assert b"betrace_data_disk_bytes" in await service.tools.exposition.scrape()
