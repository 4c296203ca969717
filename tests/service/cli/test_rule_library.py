"""The library of rules, and that its examples do what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.cli.main import cli
from betrace.service.cli.rule_library import THEMES, LibraryRule, library_rules
from betrace.service.pipeline.request import Done
from betrace.service.rules.units import unit_warnings
from betrace.service.rules.yaml_file import load_text
from betrace.service.traces.example_runs import check_examples, example_body
from tests.support.inprocess import active_signals, closed, request, running, settings

RULES = library_rules()


def betrace(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["rules", *arguments])


def test_the_library_has_25_rules_of_six_themes() -> None:
    assert len(RULES) == len({each.rule.id for each in RULES}) == 25
    assert {each.theme for each in RULES} == set(THEMES.values())


@pytest.mark.kernel
@pytest.mark.parametrize("each", RULES, ids=lambda each: each.rule.id)
def test_each_rule_has_examples_that_keep_it_and_break_it(each: LibraryRule) -> None:
    assert {example.expect for example in each.rule.examples} == {"kept", "broken"}
    assert check_examples([each.rule]) == unit_warnings([each.rule]) == []
    assert load_text(each.text, "x") == [each.rule]


@pytest.mark.slow
async def test_the_service_says_of_the_examples_what_they_say(tmp_path: Path) -> None:
    folder = tmp_path / "rules"
    folder.mkdir()
    for each in RULES:
        (folder / f"{each.rule.id}.yaml").write_text(each.text)
    sent = {
        number.to_bytes(16, "big"): (each.rule.id, example)
        for number, (each, example) in enumerate(
            ((each, example) for each in RULES for example in each.rule.examples), 1
        )
    }
    async with running(settings(tmp_path)) as service:
        for trace_id, (_, example) in sent.items():
            body = ExportTraceServiceRequest.FromString(example_body(example))
            for resource in body.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        span.trace_id = trace_id
            asked = request(body.SerializeToString())
            await service.pipeline.requests.send(asked)
            assert isinstance(await asked.reply.wait(), Done)
        await closed(service)
        raised = active_signals(service)
    found = {
        (trace_id.hex(), rule)
        for trace_id, (rule, _) in sent.items()
        if (trace_id.hex(), rule) in raised
    }
    assert found == {
        (trace_id.hex(), rule)
        for trace_id, (rule, example) in sent.items()
        if example.expect == "broken"
    }


def test_the_library_is_listed() -> None:
    result = betrace("library")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 26
    assert lines[1].split()[:4] == ["payments", "double-charge", "critical", "A"]
    listed = json.loads(betrace("library", "--json").stdout)["rules"]
    assert [each["id"] for each in listed] == [each.rule.id for each in RULES]
    assert {"theme", "id", "condition", "examples"} <= listed[0].keys()


@pytest.mark.kernel
def test_a_rule_of_the_library_is_a_rule_file(tmp_path: Path) -> None:
    shown = betrace("library", "show", "n-plus-one")
    file = tmp_path / "rules.yaml"
    file.write_text(shown.stdout)
    result = betrace("check", str(file))
    assert result.exit_code == 0
    assert result.stdout.endswith("1 file, 1 rule, 2 examples: all good\n")
    as_json = json.loads(betrace("library", "show", "n-plus-one", "--json").stdout)
    assert (as_json["id"], as_json["theme"]) == ("n-plus-one", "databases")


def test_a_rule_that_the_library_does_not_have() -> None:
    result = betrace("library", "show", "n-plus-on")
    assert result.exit_code == 3
    assert "did you mean 'n-plus-one'?" in result.stderr
    assert "betrace rules library" in betrace("library", "show", "x").stderr
