"""grafana/, docs/metrics.md and docs/runbook.md are current and complete, and promtool accepts
them."""

import re
from itertools import combinations

import pytest
import yaml

from betrace.service.cli.docs import metrics as metrics_docs
from tests.support.grafana_files import (
    FOLDER,
    ROOT,
    alerts,
    dashboard,
    metrics_of,
    needs_promtool,
    panels,
    promtool,
)

REQUIRED = """
    betrace_span_ingestion_total betrace_spans_refused_total
    betrace_rule_evaluation_latency_seconds betrace_ledger_write_latency_seconds
    betrace_duckdb_insert_latency_seconds betrace_duckdb_rows_total betrace_span_log_bytes_total
    betrace_span_log_sync_seconds betrace_seda_queue_size betrace_seda_queue_capacity
    betrace_seda_queue_peak betrace_stage_items_total
    betrace_stage_last_progress_timestamp_seconds betrace_cache_requests_total
    betrace_cache_hit_ratio betrace_circuit_breaker_state betrace_circuit_breaker_calls_total
    betrace_signals_total betrace_open_traces betrace_trace_window_bytes betrace_dead_letters
    betrace_rule_signals_total betrace_fallback_pending betrace_active_tenants
    betrace_end_to_end_latency_seconds
    process_resident_memory_bytes process_cpu_seconds_total process_open_fds
"""


def test_the_dashboard_is_current():
    generate = pytest.importorskip("grafana.generate")
    assert (FOLDER / "dashboard.json").read_text("utf-8") == generate.text(), "run make grafana"


def test_the_page_of_metrics_is_current():
    page = (ROOT / "docs/metrics.md").read_text("utf-8")
    assert page == metrics_docs.markdown(), "run make grafana"


@pytest.mark.parametrize("name", REQUIRED.split())
def test_the_metrics_that_are_required_are_declared(name):
    declared = metrics_docs.service_metrics() + metrics_docs.process_metrics()
    assert name in {metric.name for metric in declared}


def test_the_dashboard_can_be_imported_unchanged():
    board = dashboard()
    assert "__inputs" not in board  # nothing is asked at the import
    assert board["uid"] == "betrace-overview"
    assert "id" not in board or board["id"] is None  # Grafana gives one
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "pages"]
    assert variables["datasource"]["type"] == "datasource"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    wanted = ["Ingestion", "Pipeline", "Storage", "Breakers", "Caches", "Tenants", "Cluster"]
    assert titles == ["At a glance", "Rules", *wanted, "Process"]


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (a, b)


def test_each_panel_has_a_description_and_uses_the_chosen_source():
    for panel in panels():
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            selected = target["expr"].count('job=~"$job", instance=~"$instance"')
            assert selected >= len(metrics_of(target["expr"])) > 0, target["expr"]


def sections():
    """The anchors of the runbook's sections."""
    text = (ROOT / "docs/runbook.md").read_text("utf-8")
    return {name.lower(): name for name in re.findall(r"^## (\w+)$", text, re.MULTILINE)}


def test_each_alert_has_a_delay_a_severity_texts_and_a_runbook_link():
    anchors = sections()
    for alert in alerts():
        assert alert["for"]
        assert alert["labels"]["severity"] in ("warning", "critical")
        said = alert["annotations"]
        assert set(said) == {"summary", "description", "runbook"}
        page, _, anchor = said["runbook"].partition("#")
        assert page == "docs/runbook.md"
        assert anchors[anchor] == alert["alert"]


def test_each_runbook_section_describes_an_alert_in_three_parts():
    assert set(sections().values()) == {alert["alert"] for alert in alerts()}
    text = (ROOT / "docs/runbook.md").read_text("utf-8")
    for section in text.split("\n## ")[1:]:
        for part in ("**Means.**", "**See more.**", "**Do.**"):
            assert section.count(part) == 1, section.partition("\n")[0]
    links = set(re.findall(r"\]\(#(\w+)\)", text))
    assert links <= set(sections())


def test_alerts_that_panels_and_the_runbook_name_exist():
    known = {alert["alert"] for alert in alerts()}
    text = (FOLDER / "dashboard.json").read_text() + (ROOT / "docs/runbook.md").read_text()
    assert set(re.findall(r"\bBetrace[A-Z]\w+", text)) <= known


def test_each_alert_has_a_case_that_fires_and_one_that_does_not():
    fired = set()
    for case in yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]:
        series = {re.sub(r"^.*?\{|\}$", "", each["series"]) for each in case["input_series"]}
        for asked in case["alert_rule_test"]:
            if asked["exp_alerts"]:
                fired.add(asked["alertname"])
            assert len(asked["exp_alerts"]) < len(series), case["name"]  # the others are silent
    assert fired == {alert["alert"] for alert in alerts()}


@needs_promtool
def test_promtool_accepts_the_rules_and_the_configuration():
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "alerts.yaml")
    promtool("check", "config", "prometheus.yml")


@pytest.mark.slow
@needs_promtool
def test_alerts_fire_when_they_should_and_only_then():
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yaml")


def test_the_provisioning_files_are_yaml_for_this_dashboard():
    folder = FOLDER / "provisioning"
    sources = yaml.safe_load((folder / "datasources/betrace.yaml").read_text())
    assert [each["type"] for each in sources["datasources"]] == ["prometheus"]
    boards = yaml.safe_load((folder / "dashboards/betrace.yaml").read_text())
    assert [each["type"] for each in boards["providers"]] == ["file"]
