"""The rules that a log begins with, in logs of all kinds."""

from __future__ import annotations

import pytest

from betrace.channels import ThreadRunner
from betrace.service.cluster.evaluator.first_rules import FirstRules
from betrace.service.cluster.rule_keys import PUBLISHED
from betrace.service.storage.jetstream.envelope import RulesMarker, Tick, pack
from tests.support.cluster_fakes import FakeNats, FakeNode, FakeSpans


@pytest.fixture
def nats():
    return FakeNats()


async def found(nats):
    """The rules' revisions, and whether they are complete."""
    spans = FakeSpans(FakeNode(nats, "one"))
    with ThreadRunner("test", 1) as threads:
        first = FirstRules(spans, threads, 0)
        complete = await first.are_complete()
        assert await first.are_complete() == complete
    return [marker.revision for marker in first.markers], complete


def mark(nats, tenant, revision):
    nats.append("spans-0", pack(RulesMarker(tenant, revision, b"[]")))


async def test_all_markers_before_the_first_end_count(nats):
    assert await found(nats) == ([], False)
    nats.put_spans(0, "a")
    mark(nats, "acme", 5)
    nats.append("spans-0", b"damaged")
    nats.append("spans-0", pack(Tick()))
    mark(nats, "acme", 7)
    assert await found(nats) == ([5, 7], False)
    mark(nats, PUBLISHED, 8)
    mark(nats, "acme", 9)
    mark(nats, PUBLISHED, 8)
    assert await found(nats) == ([5, 7], True)


async def test_deleted_messages_do_not_matter(nats):
    nats.put_spans(0, "a")
    mark(nats, "acme", 5)
    mark(nats, PUBLISHED, 6)
    await FakeSpans(FakeNode(nats, "one")).forget_before(0, 2)
    assert await found(nats) == ([5], True)
