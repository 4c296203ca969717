"""Rules: reading, changing, checking and testing them."""

import pytest

from betrace.service.api.rule_writer import RuleWriter, TenantDeletedError
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.signals import Kind
from tests.support.api_records import OTHER, RULE, make_signal, otlp, span

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def rules(tmp_path):
    """The directory of the rule files."""
    path = tmp_path / "rules"
    path.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize("header", ["1", '"', '""', '"1" "2"', 'W/"1"'])
async def test_an_invalid_if_match(client, header):
    error = await client.ask("PUT", "/api/v1/rules/a", 400, RULE, If_Match=header)
    assert "with its quotes" in error["hint"]


async def test_validating_a_condition(client):
    path = "/api/v1/rules/validate"
    valid = await client.ask("POST", path, 200, {"condition": "never { a }"})
    assert (valid["valid"], valid["errors"], valid["decided_by"]) == (True, [], "fold")
    answer = await client.ask("POST", path, 200, {"condition": "never {\n  payment > 3 }"})
    assert answer["valid"] is False
    (error,) = answer["errors"]
    assert set(error) == {"line", "column", "message", "hint"}
    assert error["line"] == 2
    await client.ask("POST", path, 400, {"conditon": "a"})


@pytest.mark.also_on_cluster
async def test_rules_are_files_and_change_under_their_etag(client, service, rules):
    created = await client.ask("PUT", "/api/v1/rules/bypass", 201, RULE)
    assert (created["name"], created["enabled"]) == ("bypass", True)
    assert (rules / "default" / "bypass.yaml").exists()
    assert client.headers["etag"] == created["etag"]
    assert await client.ask("GET", "/api/v1/rules/bypass") == created
    assert client.headers["etag"] == created["etag"]
    (listed,) = (await client.ask("GET", "/api/v1/rules"))["rules"]
    assert listed == {**created, "active_signals": 0}
    error = await client.ask("PUT", "/api/v1/rules/bypass", 428, RULE)
    assert f"If-Match: {created['etag']}" in error["hint"]
    assert client.headers["etag"] == created["etag"]
    low = {**RULE, "severity": "low"}
    changed = await client.ask("PUT", "/api/v1/rules/bypass", 200, low, If_Match=created["etag"])
    assert changed["etag"] != created["etag"]
    assert changed["version"] == created["version"]  # the condition is the same
    error = await client.ask("PUT", "/api/v1/rules/bypass", 412, RULE, If_Match=created["etag"])
    assert "read the rule again" in error["hint"]
    (version,) = service.registry.store.versions("default", "bypass")
    assert version.severity == "critical"
    await client.ask("PUT", "/api/v1/rules/none", 404, RULE, If_Match="*")
    await client.ask("DELETE", "/api/v1/rules/none", 404, If_Match="*")
    await client.ask("DELETE", "/api/v1/rules/bypass", 428)
    await client.ask("DELETE", "/api/v1/rules/bypass", 412, If_Match=created["etag"])
    await client.ask("DELETE", "/api/v1/rules/bypass", 204, If_Match=changed["etag"])
    assert (await client.ask("GET", "/api/v1/rules"))["rules"] == []


def test_rules_of_a_deleted_tenant_cannot_be_saved(tmp_path):
    registry = RuleRegistry(RuleStore(tmp_path), 10)
    writer = RuleWriter(registry, {"gone"})
    with pytest.raises(TenantDeletedError):
        writer.put("gone", "r", RULE, None)
    assert writer.put("there", "r", RULE, None)[1]
    writer.delete_all("there")
    assert registry.store.rules("there") == registry.compiled("there").rules == ()


async def test_a_change_of_rules_takes_effect_at_once(client, service):
    assert service.registry.compiled("default").rules == ()
    created = await client.ask("PUT", "/api/v1/rules/bypass", 201, RULE)
    (compiled,) = service.registry.compiled("default").rules
    assert compiled.version == created["version"]
    await client.ask("DELETE", "/api/v1/rules/bypass", 204, If_Match="*")
    assert service.registry.compiled("default").rules == ()


async def test_rules_are_listed_with_their_active_signals(client, service):
    for rule_id in ("a", "b"):
        await client.ask("PUT", f"/api/v1/rules/{rule_id}", 201, {"condition": "never { x }"})
    path = "/api/v1/rules"
    signals = [make_signal(0, "a"), make_signal(1, "b"), make_signal(2, "b", Kind.RETRACTED)]
    service.store.write_signals("default", [*signals, make_signal(3, "gone")])
    rules = (await client.ask("GET", path))["rules"]
    assert [(r["id"], r["active_signals"]) for r in rules] == [("a", 1), ("b", 0)]
    service.store.close()
    rules = (await client.ask("GET", path))["rules"]
    assert [(r["id"], r["active_signals"]) for r in rules] == [("a", None), ("b", None)]


async def test_rules_written_by_hand_are_not_overwritten(client, service, rules):
    text = "rules:\n  - {id: a, condition: x}\n  - {id: b, condition: y}\n"
    (rules / "shop.yaml").write_text(text)
    service.registry.store.poll()
    error = await client.ask("PUT", "/api/v1/rules/a", 409, RULE, If_Match="*")
    assert "shop.yaml" in error["message"]
    saved = await client.ask("PUT", "/api/v1/rules/own", 201, RULE)
    listed = (await client.ask("GET", "/api/v1/rules"))["rules"]
    assert [(each["id"], each["source"], each["editable"]) for each in listed] == [
        ("a", "shop.yaml", False),
        ("b", "shop.yaml", False),
        ("own", "default/own.yaml", True),
    ]
    for rule in (saved, await client.ask("GET", "/api/v1/rules/own")):
        assert (rule["source"], rule["editable"]) == ("default/own.yaml", True)
    await client.ask("DELETE", "/api/v1/rules/a", 409, If_Match="*")


async def test_an_invalid_rule_is_not_saved(client, rules):
    body = {"condition": "never {\n  payment > 3 }", "labels": {"a": [1]}}
    error = await client.ask("PUT", "/api/v1/rules/a", 400, body)
    assert sorted(str(f["line"]) for f in error["errors"]) == ["2", "None"]
    assert not (rules / "default").exists()


async def test_a_full_disk_gets_503(client, service, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service.registry.store, "put", full)
    error = await client.ask("PUT", "/api/v1/rules/a", 503, RULE)
    assert "No space left" in error["message"]


@pytest.mark.parametrize(
    ("condition", "clause", "counts", "message"),
    [
        ("never { a }", "never", {"a": 2}, "forbidden: a, found 2"),
        ("always { b }", "always", {"b": 0}, "missing: b"),
        ("when { a } always { a }", None, {"a": 2}, None),
        ("count(a) > 1", "never", {"a": 2}, "condition met: more than 1 a, found 2"),
    ],
)
async def test_testing_a_rule(client, condition, clause, counts, message):
    body = {"condition": condition, "trace": otlp(span("a", 1), span("a", 2))}
    answer = await client.ask("POST", "/api/v1/rules/test", 200, body)
    assert (answer["breach"], answer["clause"]) == (clause is not None, clause)
    assert (answer["counts"], answer["message"]) == (counts, message)
    assert set(answer) == {"breach", "clause", "counts", "evidence", "message"}
    if "a" in counts:
        assert answer["evidence"]["a"] == [f"{1:016x}", f"{2:016x}"]


async def test_testing_a_rule_that_relates_spans(client):
    body = {
        "condition": "for each a as p always { b.where(followed_by(p)) }",
        "trace": otlp(span("a", 1), span("a", 2)),
    }
    answer = await client.ask("POST", "/api/v1/rules/test", 200, body)
    assert (answer["breach"], answer["clause"], answer["counts"]) == (True, "always", {"a": 2})
    assert (answer["groups"]["broken"], answer["groups"]["of"]) == (2, 2)
    body["condition"] = "never { a.where(child(*)) }"
    answer = await client.ask("POST", "/api/v1/rules/test", 200, body)
    kept = {"breach": False, "clause": None, "counts": {}, "evidence": {}, "message": None}
    assert answer == kept


async def test_the_plan_of_a_rule_that_relates_spans(client):
    body = {"condition": "never { a.where(child(b)) }"}
    answer = await client.ask("POST", "/api/v1/rules/validate", 200, body)
    assert answer["valid"] is True
    assert answer["plan"].endswith("if it has: a and b")


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (otlp(), "no span"),
        (otlp(span("a", 1), span("a", 2, OTHER)), "several traces"),
        (otlp({**span("a", 1), "traceId": "xyz"}), "traceId"),
        (otlp({**span("a", 1), "traceId": "0" * 32}), "no span"),
        ({"resourceSpans": 5}, "resourceSpans"),
        ({}, "no span"),
    ],
)
async def test_testing_a_rule_on_an_invalid_trace(client, trace, words):
    body = {"condition": "a", "trace": trace}
    error = await client.ask("POST", "/api/v1/rules/test", 400, body)
    assert words in error["message"]
    assert "OTLP JSON" in error["hint"]


async def test_testing_an_invalid_rule(client):
    body = {"condition": "never { a", "trace": otlp(span("a", 1))}
    error = await client.ask("POST", "/api/v1/rules/test", 400, body)
    assert error["errors"][0]["line"] == 1


EXAMPLE = {"name": "bypassed", "expect": "broken", "spans": ["payment.bypass"]}


async def test_a_rule_keeps_its_examples_mode_and_what_it_does_with_incomplete_traces(
    client, service
):
    given = {**RULE, "mode": "shadow", "incomplete": "skip", "examples": [EXAMPLE]}
    created = await client.ask("PUT", "/api/v1/rules/bypass", 201, given)
    assert {key: created[key] for key in given} == given
    assert await client.ask("GET", "/api/v1/rules/bypass") == created
    service.registry.store.load()
    (kept,) = service.registry.store.rules("default")
    assert (kept.mode, kept.incomplete, kept.examples[0].name) == ("shadow", "skip", "bypassed")
    tag = created["etag"]
    plain = await client.ask("PUT", "/api/v1/rules/bypass", 200, RULE, If_Match=tag)
    assert (plain["mode"], plain["incomplete"], plain["examples"]) == ("alert", "judge", [])


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({**EXAMPLE, "expect": "kept"}, "the example 'bypassed' is broken, but should be kept"),
        ({**EXAMPLE, "spans": [{"nane": "a"}]}, "unknown key 'nane' of a span"),
    ],
)
async def test_a_rule_with_a_wrong_example_is_not_saved(client, rules, example, says):
    given = {**RULE, "examples": [example]}
    error = await client.ask("PUT", "/api/v1/rules/bypass", 400, given)
    assert [each["message"] for each in error["errors"]] == [says]
    assert not list(rules.rglob("*.yaml"))


async def test_warnings_for_a_condition(client):
    condition = "a.where(span:duration > 500)"
    path = "/api/v1/rules/validate"
    answer = await client.ask("POST", path, 200, {"condition": condition})
    assert answer["valid"] is True
    (warning,) = answer["warnings"]
    assert (warning["line"], warning["column"]) == (1, 25)
    assert warning["message"] == "span:duration is in nanoseconds, so 500 means 500 ns"
