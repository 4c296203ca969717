"""Muting rules and acknowledging signals over the API."""

from __future__ import annotations

import json

import pytest

from tests.support.api_client import ApiClient
from tests.support.api_records import RULE, make_signal
from tests.support.inprocess import closed, send, settings, write_rules
from tests.support.inprocess import running as running_service
from tests.support.spans import S

MUTE = "/api/v1/rules/bypass/mute"


def audited(service):
    path = service.settings.storage.path / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def test_a_rule_is_muted_for_a_time(client, service):
    await client.ask("PUT", "/api/v1/rules/bypass", 201, RULE)
    body = {"for": "2h", "reason": "maintenance"}
    mute = await client.ask("PUT", MUTE, 200, body, X_Operator="ann")
    assert (mute["by"], mute["reason"]) == ("ann", "maintenance")
    (rule,) = (await client.get("/api/v1/rules"))["rules"]
    assert rule["muted"] == (await client.get("/api/v1/rules/bypass"))["muted"] == mute
    await client.ask("DELETE", MUTE, 204)
    assert (await client.get("/api/v1/rules/bypass"))["muted"] is None
    await client.ask("DELETE", MUTE, 404)
    found = [(r["operator"], r["action"], r["tenant"], r["rule"]) for r in audited(service)]
    assert found == [
        ("ann", "rule.mute", "default", "bypass"),
        ("default", "rule.unmute", "default", "bypass"),
    ]
    assert audited(service)[0]["reason"] == "maintenance"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"for": "2h"}, "reason is missing"),
        ({"for": "2h", "reason": " "}, "reason must have"),
        ({"for": "2h", "reason": "x" * 501}, "reason must have"),
        ({"for": "soon", "reason": "x"}, "for must be a duration"),
        ({"for": "0s", "reason": "x"}, "for must be more than 0"),
        ({"for": "367d", "reason": "x"}, "at most 366d"),
    ],
)
async def test_a_mute_that_makes_no_sense_is_refused(client, service, body, says):
    await client.ask("PUT", "/api/v1/rules/bypass", 201, RULE)
    assert says in (await client.ask("PUT", MUTE, 400, body))["message"]
    assert audited(service) == []


async def test_a_rule_that_does_not_exist_cannot_be_muted(client):
    await client.ask("PUT", MUTE, 404, {"for": "2h", "reason": "x"})


async def test_a_signal_is_acknowledged(client, service):
    signals = [make_signal(0, "a"), make_signal(1, "b")]
    service.store.write_signals("default", signals)
    path = f"/api/v1/signals/{signals[0].id}"
    assert (await client.get(path))["acknowledged"] is None
    done = await client.post(f"{path}/acknowledge", 200, {"note": "on it"}, X_Operator="ann")
    assert (done["by"], done["note"]) == ("ann", "on it")
    assert (await client.get(path))["acknowledged"] == done
    listed = (await client.get("/api/v1/signals"))["signals"]
    assert {each["rule_id"]: each["acknowledged"] for each in listed} == {"a": done, "b": None}
    (record,) = audited(service)
    assert (record["action"], record["signal"]) == ("signal.acknowledge", signals[0].id)
    await client.post(f"/api/v1/signals/{'0' * 32}/acknowledge", 404, {})
    await client.post(f"{path}/acknowledge", 400, {"note": "x" * 501})


@pytest.mark.also_on_cluster
async def test_signals_of_a_muted_rule_are_recorded_and_counted_as_muted(tmp_path):
    write_rules(tmp_path, {"bad": "never { a }", "worse": "never { a }"})
    async with running_service(settings(tmp_path)) as service:
        client = ApiClient(service)
        body = {"for": "1h", "reason": "known"}
        await client.ask("PUT", "/api/v1/rules/bad/mute", 200, body)
        await send(service, [S(1)])
        await closed(service)
        signals = (await client.get("/api/v1/signals"))["signals"]
        trace = await client.get(f"/api/v1/traces/{signals[0]['trace_id']}")
        assert trace["signals"] == signals
        text = (await client.get("/metrics")).decode()
    assert {each["rule_id"]: each["muted"] for each in signals} == {"bad": True, "worse": False}
    series = 'betrace_rule_signals_total{kind="raised",muted="%s",rule="%s",severity="medium",'
    for muted, rule, count in (("true", "bad", 1), ("false", "bad", 0), ("false", "worse", 1)):
        assert f'{series % (muted, rule)}tenant="default"}} {count}.0' in text


async def test_signals_of_a_shadow_rule_are_recorded_and_shown(tmp_path):
    folder = tmp_path / "rules" / "default"
    folder.mkdir(parents=True)
    (folder / "rules.yaml").write_text(
        "rules:\n"
        "- {id: quiet, mode: shadow, condition: 'never { a }'}\n"
        "- {id: loud, condition: 'never { a }'}\n"
    )
    async with running_service(settings(tmp_path)) as service:
        client = ApiClient(service)
        await send(service, [S(1)])
        await closed(service)
        signals = (await client.get("/api/v1/signals"))["signals"]
        only = {
            mode: (await client.get(f"/api/v1/signals?mode={mode}"))["signals"]
            for mode in ("alert", "shadow")
        }
        error = await client.ask("GET", "/api/v1/signals?mode=quiet", 400)
        text = (await client.get("/metrics")).decode()
        balances = service.ledger.balances("default")
    assert {each["rule_id"]: each["mode"] for each in signals} == {
        "quiet": "shadow",
        "loud": "alert",
    }
    assert [each["rule_id"] for each in only["shadow"]] == ["quiet"]
    assert [each["rule_id"] for each in only["alert"]] == ["loud"]
    assert "shadow" in error["message"] + error["hint"]
    assert all(each["context"] is None for each in signals)
    assert balances == {"quiet": 1, "loud": 1}
    series = 'betrace_rule_signals_total{kind="raised",muted="%s",rule="%s",severity="medium",'
    for muted, rule, count in (("true", "quiet", 1), ("false", "quiet", 0), ("false", "loud", 1)):
        assert f'{series % (muted, rule)}tenant="default"}} {count}.0' in text


@pytest.mark.also_on_cluster
async def test_signals_of_incomplete_traces_say_so(tmp_path):
    folder = tmp_path / "rules" / "default"
    folder.mkdir(parents=True)
    (folder / "rules.yaml").write_text(
        "rules:\n"
        "- {id: judges, condition: 'when { a } always { b }'}\n"
        "- {id: early, condition: 'never { a }'}\n"
        "- {id: skips, incomplete: skip, condition: 'never { a }'}\n"
        "- {id: relates, condition: 'never { a.where(not ancestor(b)) }'}\n"
    )
    async with running_service(settings(tmp_path)) as service:
        client = ApiClient(service)
        await send(service, [S(2, parent=1), S(3, parent=1), S(5, "x", parent=4)])
        await send(service, [S(9, trace=b"\2" * 16, parent=0)])
        await closed(service)
        signals = (await client.get("/api/v1/signals"))["signals"]
        of = {each["rule_id"]: each for each in signals if each["trace_id"] == "01" * 16}
        other = {each["rule_id"]: each for each in signals if each["trace_id"] == "02" * 16}
        trace = await client.get(f"/api/v1/traces/{'01' * 16}")
    says = "the trace is incomplete: 2 parents never came"
    assert {rule: (each["missing_parents"], each["reason"]) for rule, each in of.items()} == {
        "judges": (2, says),
        "relates": (2, says),
        "early": (0, None),  # raised before the trace was closed
    }
    assert other.keys() == {"judges", "relates", "early", "skips"}
    assert {(each["missing_parents"], each["reason"]) for each in other.values()} == {(0, None)}
    assert trace["missing_parents"] == 2
    assert trace["verdicts"]["skips"]["skipped"] == says
    assert trace["verdicts"]["skips"]["verdict"] == "kept"
