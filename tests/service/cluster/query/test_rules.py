"""Rules go from the files of a query node to the bucket."""

from __future__ import annotations

import orjson
import pytest

from betrace.service.cluster.query import rules
from betrace.service.cluster.query.rules import RulePublisher
from betrace.service.cluster.rule_keys import PUBLISHED, RULES_PREFIX, rules_key
from betrace.service.rules.compile import compile_definitions
from betrace.service.rules.store import ALL_TENANTS, RuleStore
from betrace.service.storage.jetstream.bucket import Conflict, Entry
from betrace.service.storage.jetstream.errors import NatsUnavailable
from tests.support.inprocess import write_rules

ANNOUNCED = RULES_PREFIX + PUBLISHED


class Bucket:
    def __init__(self):
        self.values = {}
        self.revision = 0
        self.puts = []  # except ANNOUNCED
        self.announced_after = None
        self.fail = False
        self.before_put = lambda: None

    async def get(self, key):
        if self.fail:
            raise NatsUnavailable("away")
        return Entry(key, *self.values[key]) if key in self.values else None

    async def put(self, key, value, expected_revision=None):
        self.before_put()
        now = self.values[key][1] if key in self.values else 0
        if expected_revision is not None and expected_revision != now:
            raise Conflict(key)
        self.revision += 1
        self.values[key] = value, self.revision
        self.puts.append(key)
        if key == ANNOUNCED:
            self.announced_after = self.puts[:-1]
            self.puts.pop()
        return self.revision

    def rules(self, tenant):
        return [each["id"] for each in orjson.loads(self.values[rules_key(tenant)][0])]


@pytest.fixture
def bucket():
    return Bucket()


def publisher(bucket, directory, shared=None):
    (directory / "rules").mkdir(exist_ok=True)
    store = RuleStore(directory / "rules", shared)
    store.load()
    return RulePublisher(bucket, store, directory / "published.json"), store


async def test_each_tenants_rules_are_published_once(tmp_path, bucket):
    write_rules(tmp_path, {"a": "count(x) > 1", "b": "never { y }"}, "acme")
    write_rules(tmp_path, {"c": "never { y }"}, "shop")
    publishing, store = publisher(bucket, tmp_path)
    await publishing.publish()
    await publishing.publish()
    assert bucket.rules("acme") == ["a", "b"]
    assert sorted(bucket.puts) == ["rules.acme", "rules.shop"]
    definitions = bucket.values["rules.acme"][0]
    compiled = compile_definitions(definitions, "v")
    assert compiled.definitions == definitions
    assert [each.version for each in compiled.rules] == [r.version for r in store.rules("acme")]


async def test_only_changes_are_published(tmp_path, bucket):
    write_rules(tmp_path, {"a": "never { x }"}, "acme")
    write_rules(tmp_path, {"c": "never { y }"}, "shop")
    publishing, store = publisher(bucket, tmp_path)
    await publishing.publish()
    write_rules(tmp_path, {"a": "never { z }"}, "acme")
    store.poll()
    await publishing.publish()
    assert bucket.puts[2:] == ["rules.acme"]
    again, _ = publisher(bucket, tmp_path)  # after a restart
    await again.publish()
    assert len(bucket.puts) == 3


async def test_a_tenant_without_rules_keeps_an_empty_entry(tmp_path, bucket):
    write_rules(tmp_path, {"a": "never { x }"}, "acme")
    publishing, store = publisher(bucket, tmp_path)
    await publishing.publish()
    (tmp_path / "rules" / "acme" / "rules.yaml").unlink()
    store.poll()
    await publishing.publish()
    assert bucket.rules("acme") == []


async def test_rules_removed_while_the_node_was_down_are_removed_from_the_bucket(tmp_path, bucket):
    write_rules(tmp_path, {"a": "never { x }"}, "acme")
    await publisher(bucket, tmp_path)[0].publish()
    (tmp_path / "rules" / "acme" / "rules.yaml").unlink()
    await publisher(bucket, tmp_path)[0].publish()
    assert bucket.rules("acme") == []


async def test_a_new_node_without_files_removes_nobodys_rules(tmp_path, bucket):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_rules(tmp_path / "one", {"a": "never { x }"}, "acme")
    await publisher(bucket, tmp_path / "one")[0].publish()
    await publisher(bucket, tmp_path / "two")[0].publish()
    assert bucket.rules("acme") == ["a"]
    assert len(bucket.puts) == 1


async def test_rules_for_all_tenants_have_a_key_of_their_own(tmp_path, bucket):
    write_rules(tmp_path, {"own": "never { x }"}, "acme")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "all.yaml").write_text("rules:\n  - id: common\n    condition: 'never { z }'\n")
    publishing, _ = publisher(bucket, tmp_path, shared)
    await publishing.publish()
    assert bucket.rules(ALL_TENANTS) == ["common"]
    assert bucket.rules("acme") == ["common", "own"]


async def test_a_conflict_is_resolved_by_looking_again(tmp_path, bucket):
    write_rules(tmp_path, {"a": "never { x }"}, "acme")
    publishing, _ = publisher(bucket, tmp_path)

    def interfere():
        bucket.before_put = lambda: None
        bucket.values["rules.acme"] = b"[]", 77

    bucket.before_put = interfere
    await publishing.publish()
    assert bucket.rules("acme") == ["a"]


async def test_what_cannot_be_published_is_tried_again(tmp_path, bucket):
    write_rules(tmp_path, {"a": "never { x }"}, "acme")
    publishing, _ = publisher(bucket, tmp_path)
    bucket.fail = True
    await publishing.publish()
    assert publishing.problem == "away"
    bucket.fail = False
    await publishing.publish()
    assert publishing.problem is None
    assert bucket.rules("acme") == ["a"]


async def test_it_says_when_all_rules_were_published_once(tmp_path, bucket):
    write_rules(tmp_path, {"a": "never { x }"}, "acme")
    write_rules(tmp_path, {"c": "never { y }"}, "shop")
    publishing, _ = publisher(bucket, tmp_path)
    bucket.fail = True
    await publishing.publish()
    assert bucket.announced_after is None
    bucket.fail = False
    await publishing.publish()
    assert sorted(bucket.announced_after) == ["rules.acme", "rules.shop"]


async def test_a_node_without_rules_lets_others_publish_first(tmp_path, bucket, monkeypatch):
    publishing, _ = publisher(bucket, tmp_path)
    await publishing.publish()
    assert bucket.announced_after is None
    monkeypatch.setattr(rules, "ALONE_SECONDS", 0.0)
    await publishing.publish()
    assert bucket.announced_after == []
