"""Rules are the same at all query nodes, and go to the evaluators."""

from __future__ import annotations

import logging
from functools import partial

import orjson
import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.api.rule_writer import RuleWriter
from betrace.service.cluster.query import rules
from betrace.service.cluster.query.rule_files import merge, pack_files, unpack_files
from betrace.service.cluster.query.rules import RuleSharing
from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX, rules_key
from betrace.service.rules.compile import compile_definitions
from betrace.service.rules.definition import etag
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import (
    ALL_TENANTS,
    RuleConflictError,
    RuleNotFoundError,
    RuleStore,
)
from betrace.service.storage.jetstream.bucket import Conflict
from tests.support.cluster_fakes import FakeBucket, FakeNats, FakeNode
from tests.support.inprocess import write_rules

ANNOUNCED = RULES_PREFIX + PUBLISHED


class Bucket(FakeBucket):
    """Counts what is put; ``before_put`` is called once."""

    def __init__(self, node, name):
        super().__init__(node, name)
        self.puts = []
        self.before_put = None

    async def put(self, key, value, expected_revision=None):
        before, self.before_put = self.before_put, None
        if before is not None:
            await before()
        revision = await super().put(key, value, expected_revision)
        self.puts.append(key)
        return revision


class Node:
    """A query node with its rule files."""

    def __init__(self, nats, directory, shared=None):
        directory.mkdir(exist_ok=True)
        self.rules = directory / "rules"
        self.rules.mkdir(exist_ok=True)
        self.store = RuleStore(self.rules, shared)
        self.store.load()
        self.view = FakeNode(nats, directory.name)
        self.config, self.files = Bucket(self.view, "config"), Bucket(self.view, "query")
        self.threads = ThreadRunner("test", 2)
        self.sharing = RuleSharing(
            self.config, self.files, self.store, directory / "rule-files.json", self.threads
        )
        registry = RuleRegistry(self.store, 10)
        self.writer = RuleWriter(registry, (), exchange=self.sharing.exchange_now)

    async def exchange(self):
        """As a poll of the files and of the bucket."""
        self.store.poll()
        for entry in await self.files.entries("rules."):
            self.sharing._latest[rules.tenant_of(entry.key)] = entry.revision
        await self.sharing.exchange()
        assert self.sharing.problem is None
        await self.sharing.exchange()

    def ids(self, tenant="acme"):
        return sorted(rule.id for rule in self.store.rules(tenant))

    async def put(self, rule_id, condition, if_match=None, tenant="acme"):
        put = partial(self.writer.put, tenant, rule_id, {"condition": condition}, if_match)
        return await self.threads.run(put)

    async def delete(self, rule_id, tenant="acme"):
        await self.threads.run(self.writer.delete, tenant, rule_id, "*")


@pytest.fixture
def nats():
    found = FakeNats()
    found.buckets["config"].clear()
    return found


@pytest.fixture
def make(nats, tmp_path):
    made = []

    def node(name="one", shared=None):
        made.append(Node(nats, tmp_path / name, shared))
        return made[-1]

    yield node
    for each in made:
        each.threads.close()


def published(nats, tenant="acme"):
    entry = nats.buckets["config"].get(rules_key(tenant))
    return None if entry is None else [each["id"] for each in orjson.loads(entry.value)]


async def test_each_tenants_rules_are_published_once(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "count(x) > 1", "b": "never { y }"}, "acme")
    write_rules(tmp_path / "one", {"c": "never { y }"}, "shop")
    one = make()
    await one.exchange()
    await one.exchange()
    assert published(nats) == ["a", "b"]
    assert one.config.puts == ["rules.acme", "rules.shop", ANNOUNCED]
    definitions = nats.buckets["config"]["rules.acme"].value
    compiled = compile_definitions(definitions, "v")
    assert compiled.definitions == definitions
    assert [r.version for r in compiled.rules] == [r.version for r in one.store.rules("acme")]


async def test_only_changes_are_published(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    write_rules(tmp_path / "one", {"c": "never { y }"}, "shop")
    one = make()
    await one.exchange()
    write_rules(tmp_path / "one", {"a": "never { z }"}, "acme")
    await one.exchange()
    assert one.config.puts[3:] == ["rules.acme"]
    again = make()  # after a restart
    await again.exchange()
    assert again.config.puts == []
    assert again.files.puts == []


async def test_files_of_one_node_reach_the_others(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one, two = make("one"), make("two")
    await one.exchange()
    await two.exchange()
    assert two.ids() == ["a"]
    assert two.config.puts == []  # it is published already
    (two.rules / "shop").mkdir()
    (two.rules / "shop" / "more.yaml").write_text("rules:\n- {id: b, condition: 'never { y }'}\n")
    (two.rules / "top.yaml").write_text("rules:\n- {id: c, condition: 'never { z }'}\n")
    await two.exchange()
    await one.exchange()
    assert one.ids("shop") == ["b"]
    assert one.ids("default") == ["c"]
    assert published(nats, "shop") == ["b"]
    assert (one.rules / "top.yaml").read_text() == (two.rules / "top.yaml").read_text()


async def test_a_file_that_is_deleted_at_one_node_is_deleted_at_all(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one, two = make("one"), make("two")
    await one.exchange()
    await two.exchange()
    (two.rules / "acme" / "rules.yaml").unlink()
    await two.exchange()
    await one.exchange()
    assert one.ids() == []
    assert published(nats) == []


async def test_a_directory_that_was_lost_is_restored(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one = make()
    await one.exchange()
    (one.rules / "acme" / "rules.yaml").unlink()
    again = make()
    await again.exchange()
    assert again.ids() == ["a"]
    assert published(nats) == ["a"]


async def test_a_file_that_was_deleted_while_the_node_was_down_is_deleted(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    write_rules(tmp_path / "one", {"b": "never { x }"}, "shop")
    one = make()
    await one.exchange()
    (one.rules / "acme" / "rules.yaml").unlink()
    again = make()
    await again.exchange()
    assert published(nats) == []
    assert published(nats, "shop") == ["b"]


async def test_rules_for_all_tenants_have_a_key_of_their_own(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"own": "never { x }"}, "acme")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "all.yaml").write_text("rules:\n  - id: common\n    condition: 'never { z }'\n")
    one = make("one", shared)
    await one.exchange()
    assert published(nats, ALL_TENANTS) == ["common"]
    assert published(nats) == ["own"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    two = make("two", elsewhere)
    await two.exchange()
    assert (elsewhere / "all.yaml").exists()
    assert two.ids() == ["common", "own"]
    three = make("three")  # without such a directory
    await three.exchange()
    assert three.ids() == ["own"]
    assert published(nats, ALL_TENANTS) == ["common"]


async def test_changes_of_two_nodes_at_the_same_time_are_both_kept(tmp_path, nats, make):
    one, two = make("one"), make("two")

    async def interfere():
        await two.put("b", "never { y }")

    one.files.before_put = interfere
    await one.put("a", "never { x }")
    assert one.ids() == ["a", "b"]
    await two.exchange()
    assert one.ids() == two.ids() == ["a", "b"]
    assert published(nats) == ["a", "b"]


async def test_one_of_two_changes_of_the_same_rule_is_refused(nats, make):
    one, two = make("one"), make("two")
    await one.put("a", "never { x }")
    tag = etag(one.store.rule("acme", "a"))

    async def interfere():
        await two.put("a", "never { there }", tag)

    one.files.before_put = interfere
    with pytest.raises(RuleConflictError, match="another query node"):
        await one.put("a", "never { here }", tag)
    assert one.store.rule("acme", "a").condition == "never { there }"
    with pytest.raises(RuleConflictError, match="has changed"):
        await two.put("a", "never { late }", tag)


async def test_a_rule_can_be_changed_and_deleted_at_any_node(nats, make):
    one, two = make("one"), make("two")
    await one.put("a", "never { x }")
    tag = etag(one.store.rule("acme", "a"))
    await two.put("a", "never { y }", tag)  # without waiting for anything
    await one.delete("a")
    with pytest.raises(RuleNotFoundError):
        await two.delete("a")
    assert two.ids() == []
    assert published(nats) == []
    assert [rule.condition for rule in one.store.versions("acme", "a")] == [
        "never { y }",
        "never { x }",
    ]


async def test_a_file_that_changed_on_both_sides_is_kept_beside(tmp_path, nats, make, caplog):
    caplog.set_level(logging.INFO, "service.events")
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    write_rules(tmp_path / "two", {"a": "never { y }"}, "acme")
    one, two = make("one"), make("two")
    await one.exchange()
    await two.exchange()
    assert two.store.rule("acme", "a").condition == "never { x }"
    kept = two.rules / "acme" / "rules.yaml.conflict"
    assert "never { y }" in kept.read_text()
    assert any("changed here and at another" in each.getMessage() for each in caplog.records)


async def test_an_invalid_file_stays_where_it_is(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one, two = make("one"), make("two")
    await one.exchange()
    await two.exchange()
    (one.rules / "acme" / "rules.yaml").write_text("rules: nonsense")
    await one.exchange()
    await two.exchange()
    assert published(nats) == ["a"]
    assert two.ids() == ["a"]
    again = make("one")  # after a restart no version of it is in force here
    (again.rules / "acme" / "more.yaml").write_text("rules:\n- {id: b, condition: 'never { y }'}\n")
    again.store.poll()
    await again.sharing.exchange()
    assert "invalid" in again.sharing.problem
    await two.exchange()  # it has all files, and publishes them
    assert published(nats) == ["b", "a"]


async def test_a_conflict_with_another_publisher_is_resolved_by_looking_again(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one = make()

    async def interfere():
        await FakeBucket(FakeNode(nats, "x"), "config").put("rules.acme", b"[]")

    one.config.before_put = interfere
    await one.exchange()
    assert published(nats) == ["a"]


async def test_rules_of_files_that_are_no_longer_the_latest_are_not_published(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one, two = make("one"), make("two")
    texts = {"acme/rules.yaml": "rules:\n- {id: later, condition: 'never { z }'}\n"}

    async def interfere():  # another node is faster with later files
        await two.files.put("rules.acme", pack_files(texts))
        await two.exchange()
        raise Conflict("rules.acme")

    one.config.before_put = interfere
    one.store.poll()
    await one.sharing.exchange()
    assert published(nats) == ["later"]
    await one.exchange()
    assert one.ids() == ["later"]
    assert published(nats) == ["later"]


async def test_what_cannot_be_published_is_tried_again(tmp_path, nats, make):
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    one = make()
    one.view.unavailable = True
    await one.sharing.exchange()
    assert "do not answer" in one.sharing.problem
    assert published(nats) is None
    one.view.unavailable = False
    await one.sharing.exchange()
    assert one.sharing.problem is None
    assert published(nats) == ["a"]
    assert ANNOUNCED in nats.buckets["config"]


async def test_a_node_without_rules_lets_others_publish_first(nats, make, monkeypatch):
    one = make()
    await one.exchange()
    assert ANNOUNCED not in nats.buckets["config"]
    monkeypatch.setattr(rules, "ALONE_SECONDS", 0.0)
    await one.exchange()
    assert ANNOUNCED in nats.buckets["config"]


async def test_it_follows_the_other_nodes(nats, make):
    one, two = make("one"), make("two")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.sharing.run)
        await one.put("a", "never { x }")
        with trio.fail_after(60):
            while two.ids() != ["a"]:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_an_entry_that_cannot_be_read_is_reported(nats, make):
    one = make()
    await one.files.put("rules.acme", b"nonsense")
    one.sharing._latest["acme"] = 1
    await one.sharing.exchange()
    assert "tenant acme: it is damaged" in one.sharing.problem


def test_files_outside_the_tenants_directory_are_refused(tmp_path):
    store = RuleStore(tmp_path)
    for tenant, name in (
        ("acme", "../x.yaml"),
        ("acme", "shop/x.yaml"),
        ("acme", "x.yaml"),
        ("acme", "acme/.x.yaml"),
        ("acme", "acme/x.txt"),
        (ALL_TENANTS, "x.yaml"),
        ("default", "acme/x.yaml"),
    ):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            store.write_texts(tenant, {name: "rules: []"})


def test_a_merge_compares_with_what_agreed_last():
    known = {"same": "x"}
    found = merge(known, {"new": "1"}, {"theirs": "2"}, ())
    assert found.publish == {"new": "1"}
    assert found.write == {"theirs": "2"}
    assert unpack_files(pack_files({"a": "ü"})) == {"a": "ü"}
    assert unpack_files(None) == {}
