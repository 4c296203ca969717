"""The compiled rules of each tenant: cached, bounded, compiled again when they change."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from service.rules.files import RuleStore, make_rule
from service.rules.registry import RuleRegistry, rules_version

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
    assert registry.statistics() == {
        "hitCount": 1,
        "missCount": 1,
        "hitRate": 0.5,
        "size": 1,
        "maxSize": 2,
    }


def test_a_tenant_without_rules_has_an_empty_set(registry):
    assert registry.compiled("nobody").rules == ()


def test_the_cache_is_bounded_and_what_left_it_is_the_same_version(registry):
    first = registry.compiled("one")
    registry.compiled("two")
    registry.compiled("three")
    assert registry.statistics()["size"] == 2
    again = registry.compiled("one")
    assert again is not first
    assert again.version == first.version


def test_what_changed_is_compiled_again(registry, tmp_path):
    one, two = registry.compiled("one"), registry.compiled("two")
    write(tmp_path, "one", "count(a) > 22")
    assert registry.refresh() == {"one"}
    assert registry.compiled("one").version != one.version
    assert registry.compiled("two") is two
    assert registry.refresh() == set()


def test_forgetting_a_tenant_compiles_its_rules_again(registry):
    one = registry.compiled("one")
    registry.forget("one")
    registry.forget("nobody")
    assert registry.compiled("one") is not one


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
def test_whatever_a_signal_says_is_of_the_version(change):
    """Or a change would not reach a tenant that has open traces: it keeps the rules of a version
    that it knows."""
    assert rules_version((rule(),)) != rules_version((rule(**change),))


def test_what_no_signal_says_is_not_of_the_version():
    off = rule(id="off", enabled=False)
    assert rules_version((rule(),)) == rules_version((rule(description="x"), off))
    assert rules_version((rule(labels={"a": "1", "b": "2"}),)) == rules_version(
        (rule(labels={"b": "2", "a": "1"}),)
    )


def test_parts_of_different_rules_do_not_run_together():
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
