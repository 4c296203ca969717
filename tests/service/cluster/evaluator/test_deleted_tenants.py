"""A tenant is deleted, and perhaps created again, in the log of a partition."""

from __future__ import annotations

import pytest

from betrace.service.cluster.evaluator.rule_feed import RuleFeed
from betrace.service.cluster.tenant_entries import GONE, pack_tenant, tenant_key
from betrace.service.storage.jetstream.bucket import Entry
from betrace.service.tenancy.tenant import Tenant, TenantState
from betrace.service.tenants import log_name
from tests.support.partition_world import Owner, PartitionWorld
from tests.support.spans import S

pytestmark = pytest.mark.kernel

TRACE = bytes([1]) * 16


@pytest.fixture
def world() -> PartitionWorld:
    """A partition with a rule of acme and one of beta: traces with other than two spans a raise
    signals when they close."""
    found = PartitionWorld()
    found.rules("acme", "count(a) != 2")
    found.rules("beta", "count(a) != 2")
    return found


def finished(world: PartitionWorld, checkpoint: bytes | None = None) -> Owner:
    owner = Owner(world, checkpoint)
    owner.finish()
    return owner


def names(world: PartitionWorld) -> list[str]:
    """The tenants of the traces in the output."""
    return [tenant for tenant, _, _ in world.closed]


def test_open_traces_of_a_deleted_tenant_are_dropped_with_its_rules(world):
    world.spans({"acme": [S(1)], "beta": [S(1)]})
    world.delete("acme")
    world.spans({"acme": [S(2)], "beta": [S(2), S(3)]})  # sent before an edge knew of it
    world.quiet(4)
    owner = finished(world)
    assert names(world) == ["beta"]
    assert {signal.tenant for signal in world.signals} == {"beta"}
    assert owner.state.counts.deleted_spans == 1
    assert owner.state.look_up("acme", TRACE.hex()) is None
    assert not owner.state.engine.rules.compiled("acme").rules


def test_a_tenant_that_is_created_again_starts_empty(world):
    world.spans({"acme": [S(1)]})
    again = log_name("acme", world.delete("acme"))
    world.spans({again: [S(2)]})
    world.spans({"acme": [S(3)]})  # of the deleted tenant
    world.rules("acme", "count(a) > 0", revision=1)  # from before the deletion
    world.quiet(4)
    finished(world)
    assert world.closed == [(again, TRACE.hex(), 1)]
    assert not world.signals
    world.rules("acme", "count(a) > 0")
    world.spans({again: [S(4, trace=bytes([2]) * 16)]})
    world.quiet(4)
    finished(world)
    assert [signal.tenant for signal in world.signals] == [again]


def test_spans_of_a_tenant_that_was_created_again_may_come_before_the_marker(world):
    world.spans({"acme": [S(1)]})
    again = log_name("acme", 7)
    world.spans({again: [S(2)], "beta": [S(2)]}, after_ms=5)
    world.spans({"acme": [S(3)]}, after_ms=5)
    world.rules("acme", "count(a) > 0", revision=9)
    world.revision = 6
    assert world.delete("acme") == 7
    world.spans({again: [S(4, trace=bytes([2]) * 16)]})
    world.quiet(4)
    owner = finished(world)
    assert sorted(names(world)) == [again, again, "beta"]
    assert owner.state.counts.deleted_spans == 2
    found = sorted(signal.tenant for signal in world.signals)
    assert found == [again, "beta"]  # the rules from after the deletion stay


@pytest.mark.parametrize("applied", [3, 5, 8])
@pytest.mark.parametrize("stored", [True, False])
def test_a_successor_decides_the_same(world, applied, stored):
    world.spans({"acme": [S(1)], "beta": [S(1)]})
    again = log_name("acme", world.delete("acme"))
    world.spans({"acme": [S(2)]})
    world.rules("acme", "count(a) > 1")
    world.spans({again: [S(2), S(3)]})
    world.quiet(4)
    first = Owner(world)
    first.apply(applied)
    checkpoint = first.state.snapshot(len(world.out))
    first.apply(store=stored)
    finished(world, checkpoint)
    assert sorted(names(world)) == [again, "beta"]
    assert sorted(signal.tenant for signal in world.signals) == [again, "beta"]


def test_late_spans_of_a_deleted_tenant_bring_nothing_back(world):
    world.spans({"acme": [S(1)]})
    world.quiet(10)  # it is closed, and leaves memory
    owner = finished(world)
    world.project()
    again = log_name("acme", world.delete("acme"))
    world.spans({again: [S(2)]})
    world.quiet(10)
    owner.finish()
    assert world.closed == [("acme", TRACE.hex(), 1), (again, TRACE.hex(), 1)]


def test_owners_learn_of_deletions_from_the_bucket():
    feed = RuleFeed(None)
    acme = Tenant("acme", TenantState.ACTIVE, 1, None)
    feed.note(Entry(tenant_key("acme"), pack_tenant(acme), 3))
    assert feed.newer_than({}) == []
    gone = Tenant("acme", TenantState.DELETED, 1, None)
    feed.note(Entry(tenant_key("acme"), pack_tenant(gone), 4))
    [found] = feed.newer_than({})
    assert (found.tenant, found.revision, found.definitions) == (GONE + "acme", 4, b"")
    again = Tenant("acme", TenantState.ACTIVE, 1, None, generation=4)
    feed.note(Entry(tenant_key("acme"), pack_tenant(again), 5))
    assert feed.newer_than({}) == [found]
    assert feed.newer_than({GONE + "acme": 4}) == []
    feed.note(Entry(tenant_key("acme"), b"junk", 6))
    feed.note(Entry(tenant_key("=ingestion"), b"{}", 7))
    assert feed.newer_than({}) == [found]
