"""Rules for all tenants, from the operator's directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from betrace.channels import ThreadRunner
from betrace.service.api.rule_writer import RuleWriter
from betrace.service.rules.definition import make_rule
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import (
    ALL_TENANTS,
    RuleNotFoundError,
    RuleReadOnlyError,
    RuleStore,
)
from betrace.service.rules.watch import RuleWatch
from betrace.service.rules.yaml_file import dump_rules
from tests.support.api_client import ApiClient
from tests.support.inprocess import closed, running, send, settings, write_rules
from tests.support.spans import S


def text_of(*ids: str, condition: str = "a") -> str:
    return dump_rules([make_rule({"id": each, "condition": condition}) for each in ids])


@pytest.fixture
def store(tmp_path: Path) -> RuleStore:
    for name, text in {
        "all/common.yaml": text_of("no-secrets"),
        "own/acme/own.yaml": text_of("mine"),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = RuleStore(tmp_path / "own", tmp_path / "all")
    found.load()
    return found


def ids(store: RuleStore, tenant: str) -> list[str]:
    return [rule.id for rule in store.rules(tenant)]


def test_every_tenant_has_them(store: RuleStore) -> None:
    assert ids(store, "acme") == ["no-secrets", "mine"]
    assert ids(store, "new") == ["no-secrets"]
    assert store.source("new", "no-secrets") == ("common.yaml", False)
    assert store.for_all_tenants("no-secrets")
    assert not store.for_all_tenants("mine")
    assert store.tenants() == ("acme",)
    store.follow("new")
    assert store.all_rules().keys() == {"acme", "new"}
    assert store.problems == {}
    store.delete_tenant("new")
    assert store.tenants() == ("acme",)


def test_changes_apply_to_all_tenants(store: RuleStore, tmp_path: Path) -> None:
    registry = RuleRegistry(store, 10)
    before = {tenant: registry.compiled(tenant) for tenant in ("acme", "new")}
    (tmp_path / "all" / "more.yaml").write_text(text_of("another"))
    assert registry.refresh() == {ALL_TENANTS, "acme", "new"}
    assert ids(store, "new") == ["no-secrets", "another"]
    for tenant, old in before.items():
        assert len(registry.compiled(tenant).rules) == len(old.rules) + 1
    for path in (tmp_path / "all").iterdir():
        path.unlink()
    registry.refresh()
    assert ids(store, "new") == []
    assert store.tenants() == ("acme",)


def test_a_broken_file_keeps_its_last_valid_version(store: RuleStore, tmp_path: Path) -> None:
    path = tmp_path / "all" / "common.yaml"
    path.write_text("rules: nonsense")
    store.poll()
    assert ids(store, "new") == ["no-secrets"]
    assert str(path) in store.problems
    (tmp_path / "all").rename(tmp_path / "moved")
    store.poll()
    assert ids(store, "new") == ["no-secrets"]
    assert "cannot be read" in store.problems[str(tmp_path / "all")]


def test_an_own_rule_with_the_same_id_is_ignored_and_reported(
    store: RuleStore, tmp_path: Path
) -> None:
    path = tmp_path / "own" / "acme" / "clash.yaml"
    path.write_text(text_of("no-secrets", condition="b"))
    store.poll()
    assert ids(store, "acme") == ["no-secrets", "mine"]
    assert store.rule("acme", "no-secrets").condition == "a"
    (problem,) = store.problems.values()
    common = tmp_path / "all" / "common.yaml"
    assert problem.endswith(
        f"rule no-secrets: ignored, its id is that of a rule for all tenants, in {common}; "
        "choose another id"
    )


def _put(writer: RuleWriter) -> Any:
    return writer.put("acme", "no-secrets", {"condition": "b"}, None)


def _replace(writer: RuleWriter) -> Any:
    return writer.put("acme", "no-secrets", {"condition": "b"}, "*")


def _delete(writer: RuleWriter) -> Any:
    return writer.delete("acme", "no-secrets", "*")


@pytest.mark.parametrize("change", [_put, _replace, _delete])
def test_tenants_cannot_change_them(store: RuleStore, change: Callable[[RuleWriter], Any]) -> None:
    writer = RuleWriter(RuleRegistry(store, 10), ())
    with pytest.raises(RuleReadOnlyError, match="for all tenants, which only the operator"):
        change(writer)
    assert ids(store, "acme") == ["no-secrets", "mine"]


def test_a_tenant_may_still_have_its_own_rules(store: RuleStore) -> None:
    writer = RuleWriter(RuleRegistry(store, 10), ())
    writer.put("acme", "other", {"condition": "b"}, None)
    assert ids(store, "acme") == ["no-secrets", "other", "mine"]  # by file
    writer.delete("acme", "other", "*")
    with pytest.raises(RuleNotFoundError):
        store.rule("acme", "other")


def test_a_directory_within_the_rules_is_not_a_tenant(tmp_path: Path) -> None:
    (tmp_path / "everyone").mkdir()
    (tmp_path / "everyone" / "a.yaml").write_text(text_of("a"))
    store = RuleStore(tmp_path, tmp_path / "everyone")
    store.load()
    assert store.tenants() == ()
    assert ids(store, "acme") == ["a"]


@pytest.mark.slow
async def test_the_running_service_applies_them_to_tenants_without_rules(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "common.yaml").write_text(text_of("never-a", condition="never { a }"))
    write_rules(tmp_path, {"own": "never { b }"}, "acme")
    shared = {"all_tenants_directory": str(tmp_path / "all")}
    async with running(settings(tmp_path, rules=shared)) as service:
        client = ApiClient(service)
        for tenant in ("acme", "other"):
            await send(service, [S(1, "a"), S(2, "b")], tenant)
        await closed(service)
        broken = {}
        for tenant in ("acme", "other"):
            found = await client.get("/api/v1/signals", X_Scope_OrgID=tenant)
            broken[tenant] = {each["rule_id"] for each in found["signals"]}
        assert broken == {"acme": {"never-a", "own"}, "other": {"never-a"}}
        (rule,) = (await client.get("/api/v1/rules", X_Scope_OrgID="other"))["rules"]
        assert (rule["id"], rule["all_tenants"], rule["editable"]) == ("never-a", True, False)
        answer = await client.ask("DELETE", "/api/v1/rules/never-a", 409, If_Match="*")
        assert "for all tenants" in answer["message"]
        exposition = (await service.tools.exposition.scrape()).decode()
        assert (
            'betrace_rule_signals_total{kind="raised",muted="false",rule="never-a",'
            'severity="medium",tenant="other"} 1.0'
        ) in exposition


async def test_problems_at_the_start_are_logged(
    store: RuleStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own" / "acme" / "clash.yaml").write_text(text_of("no-secrets"))
    store.load()
    async with trio.open_nursery() as nursery:
        threads = ThreadRunner("rules", 1)
        nursery.start_soon(RuleWatch(RuleRegistry(store, 10), threads, 60).run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    threads.close()
    (message,) = [each.getMessage() for each in caplog.records]
    assert "choose another id" in message
