"""Every declared metric is exposed with its help text and labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from betrace.service.api.metrics.exposition import DECLARED
from tests.support.inprocess import closed, running, send, settings, write_rules
from tests.support.spans import S

SPECIFICATION = Path(__file__).parents[3] / "../shared/spec/operations.md"


async def families(tmp_path, *, busy: bool):
    write_rules(tmp_path, {"many": "count(a) > 1", "no-b": "always { b }"})
    async with running(settings(tmp_path)) as service:
        if busy:
            await send(service, [S(1), S(2), S(2), S(0)])
            await closed(service)
            with trio.fail_after(60):
                while not service.pipeline.correlate.clock.survey.closed:  # once a second
                    await trio.sleep(0.02)
        text = (await service.tools.exposition.scrape()).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(family) -> dict[frozenset[str], float]:
    """Values by the values of their labels."""
    found = (s for s in family.samples if not s.name.endswith("_created"))
    return {frozenset(s.labels.values()): s.value for s in found}


async def test_every_declared_metric_is_exposed_with_help_and_labels(tmp_path):
    found = await families(tmp_path, busy=False)
    for declared in DECLARED:
        family = found[declared.name]
        assert family.type == declared.kind
        assert family.documentation == declared.text
        assert declared.text.endswith(".")
        for sample in family.samples:
            assert set(sample.labels) == set(declared.labels)


def test_names_follow_prometheus_and_are_unique():
    names = [declared.name for declared in DECLARED]
    assert len(names) == len(set(names))
    for declared in DECLARED:
        assert re.fullmatch(r"betrace_[a-z_]+", declared.name)
        assert not declared.name.endswith(("_total", "_ms", "_millis"))
        assert "trace_id" not in declared.labels


@pytest.mark.one_process("ingestion and evaluation are stages of other nodes")
async def test_counts_after_work(tmp_path):
    found = await families(tmp_path, busy=True)

    def value(name: str, *labels: str) -> float:
        return samples(found[name])[frozenset(labels)]

    assert value("betrace_span_ingestion") == 3
    assert value("betrace_spans_rejected") == 1
    assert value("betrace_spans_evaluated") == 3
    assert value("betrace_spans_repeated") == 1
    assert value("betrace_spans_in_flight") == 0
    assert value("betrace_signals", "medium", "raised") == 2
    assert value("betrace_signals", "critical", "retracted") == 0
    assert value("betrace_signals_early") == 1
    assert value("betrace_traces_closed") == 1
    assert value("betrace_open_traces") == 0
    assert value("betrace_stage_items", "span-ingestion", "done") == 1
    assert value("betrace_stage_last_progress_timestamp_seconds", "storage-write") > 1.6e9
    assert value("betrace_span_log_bytes") > 100
    assert value("betrace_duckdb_rows") == 3


@pytest.mark.one_process("ingestion and evaluation are stages of other nodes")
async def test_latencies_are_observed(tmp_path):
    found = await families(tmp_path, busy=True)

    def count(name: str) -> float:
        return sum(s.value for s in found[name].samples if s.name == f"{name}_count")

    for name in (
        "betrace_stage_latency_seconds",
        "betrace_ledger_write_latency_seconds",
        "betrace_duckdb_insert_latency_seconds",
        "betrace_end_to_end_latency_seconds",
        "betrace_rule_evaluation_latency_seconds",
    ):
        assert count(name) > 0, name


async def test_label_sets_exist_from_the_start(tmp_path):
    found = await families(tmp_path, busy=False)
    assert len(samples(found["betrace_signals"])) == 10
    for name in ("betrace_seda_queue_size", "betrace_seda_queue_capacity"):
        queues = frozenset().union(*samples(found[name]))
        assert queues >= {
            "span-ingestion",
            "trace-correlation",
            "rule-evaluation",
            "storage-write",
        }


def _specified() -> set[str]:
    if not SPECIFICATION.exists():
        return set()
    text = SPECIFICATION.read_text()
    section = text[text.index("## Metrics") :].split("\n## ")[0]
    return set(re.findall(r"`(betrace_[a-z_]+)", section))


@pytest.mark.skipif(not _specified(), reason="../shared/spec is not beside the repository")
async def test_the_metrics_of_the_specification_exist(tmp_path):
    found = await families(tmp_path, busy=False)
    known = set(found) | {f"{name}_total" for name, f in found.items() if f.type == "counter"}
    assert _specified() <= known
