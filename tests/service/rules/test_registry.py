"""The compiled rules of each tenant: cached, bounded, compiled again after changes."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import pytest

from betrace.service.rules.definition import make_rule
from betrace.service.rules.registry import RuleRegistry, rules_version, weight
from betrace.service.rules.store import RuleStore

CONDITION = "count(a) > 1"


def rule(**changes):
    return make_rule({"id": "r", "condition": CONDITION, **changes})


def write(directory: Path, tenant: str, condition: str = CONDITION, **more: str) -> None:
    (directory / tenant).mkdir(parents=True, exist_ok=True)
    lines = [f"  - id: r\n    condition: {condition}\n"]
    lines += [f"    {key}: {value}\n" for key, value in more.items()]
    (directory / tenant / "rules.yaml").write_text("rules:\n" + "".join(lines))


@pytest.fixture
def registry(tmp_path: Path) -> RuleRegistry:
    for tenant in ("one", "two", "three"):
        write(tmp_path, tenant)
    store = RuleStore(tmp_path)
    store.load()
    return RuleRegistry(store, size=2)


def test_rules_are_compiled_once(registry):
    assert registry.compiled("one") is registry.compiled("one")
    found = registry.statistics()
    assert (found["hitCount"], found["missCount"], found["size"]) == (1, 1, 1)
    assert found["loadSuccessCount"] == 1
    assert 0 < found["bytes"] < 100_000


def test_a_tenant_without_rules_has_an_empty_set(registry):
    assert registry.compiled("nobody").rules == ()


def test_rules_in_use_are_not_compiled_again_after_leaving_the_cache(registry):
    """Open traces keep the rules they were opened under, and share them with later ones."""
    first = registry.compiled("one")
    registry.compiled("two")
    registry.compiled("three")
    assert registry.statistics()["size"] == 2
    assert registry.compiled("one") is first
    version = first.version
    gone = weakref.ref(first)
    del first
    registry.compiled("two")
    registry.compiled("three")
    assert gone() is None
    assert registry.compiled("one").version == version


def test_unused_rules_leave_the_cache(registry):
    now = [0.0]
    registry = RuleRegistry(registry.store, 2, ttl_seconds=60, clock=lambda: now[0])
    registry.compiled("one")
    registry.compiled("two")
    for now[0] in (50.0, 100.0):
        registry.compiled("one")
    found = registry.statistics()
    assert (found["size"], found["evictionCount"], found["hitCount"]) == (1, 1, 2)


def test_fewer_large_rules_fit_into_the_cache(registry):
    one = weight(registry.compiled("one"))
    small = RuleRegistry(registry.store, 3, max_bytes=2 * one)
    for tenant in ("one", "two", "three"):
        small.compiled(tenant)
    assert small.statistics()["size"] == 2


def test_changed_rules_are_compiled_again(registry, tmp_path):
    one, two = registry.compiled("one"), registry.compiled("two")
    write(tmp_path, "one", "count(a) > 22")
    assert registry.refresh() == {"one"}
    assert registry.compiled("one").version != one.version
    assert registry.compiled("two") is two
    assert registry.refresh() == set()


def test_a_saved_rule_is_in_force_after_its_tenant_is_forgotten(registry):
    one = registry.compiled("one")
    registry.store.put("one", "s", rule(id="s"))
    assert registry.compiled("one") is one
    registry.forget("one")
    registry.forget("nobody")
    assert [each.id for each in registry.compiled("one").rules] == ["r", "s"]


def test_a_former_version_is_compiled_from_its_definitions_while_nothing_else_has_it(
    registry, tmp_path
):
    asked = []

    def definitions() -> bytes:
        asked.append(1)
        return text

    first = registry.compiled("one")
    version, text = first.version, first.definitions
    assert registry.version("one", version, definitions) is first
    write(tmp_path, "one", "count(a) > 22")
    assert registry.refresh() == {"one"}
    registry.compiled("one")
    assert registry.version("one", version, definitions) is first
    assert not asked
    del first
    again = registry.version("one", version, definitions)
    assert registry.version("one", version, definitions) is again
    assert (again.version, again.definitions, len(asked)) == (version, text, 1)
    assert registry.version("one", "unknown", lambda: None) is None


def test_rules_are_ready_once_they_are_compiled(registry, tmp_path):
    assert not registry.ready("one")
    kept = registry.compiled("one")
    assert registry.ready("one")
    write(tmp_path, "one", "count(a) > 22")
    registry.refresh()
    assert not registry.ready("one")
    assert registry.compiled("one") is not kept


def test_a_look_up_during_a_change_is_not_remembered(registry, tmp_path, monkeypatch):
    """The change is noted while another thread compiles the old rules."""
    rules = registry.store.rules

    def slow(tenant):
        found = rules(tenant)
        write(tmp_path, "one", "count(a) > 22")
        monkeypatch.setattr(registry.store, "rules", rules)
        assert registry.refresh() == {"one"}
        return found

    monkeypatch.setattr(registry.store, "rules", slow)
    registry.store.follow("one")
    old = registry.compiled("one")
    assert not registry.ready("one")
    assert registry.compiled("one").version != old.version


@pytest.mark.parametrize(
    "change",
    [
        {"condition": "count(a) > 2"},
        {"severity": "critical"},
        {"name": "another name"},
        {"labels": {"team": "payments"}},
        {"enabled": False},
        {"id": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_signals_contain_changes_the_version(change):
    """Otherwise a change would not reach a tenant with open traces, because it keeps the rules of a
    known version."""
    assert rules_version((rule(),)) != rules_version((rule(**change),))


def test_what_no_signal_contains_does_not_change_the_version():
    off = rule(id="off", enabled=False)
    assert rules_version((rule(),)) == rules_version((rule(description="x"), off))
    assert rules_version((rule(labels={"a": "1", "b": "2"}),)) == rules_version(
        (rule(labels={"b": "2", "a": "1"}),)
    )


def test_the_version_separates_the_parts_of_rules():
    assert rules_version((rule(labels={"b": "c"}),)) != rules_version((rule(labels={"bc": ""}),))
    assert rules_version((rule(name="x\nr\0"),)) != rules_version((rule(name="x"), rule(id="r2")))


def test_threads_share_one_compilation(registry):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(registry.compiled("one"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each) for each in found}) == 1
