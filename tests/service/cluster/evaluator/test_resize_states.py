"""A change of the number of partitions: the states of former partitions are passed on exactly."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.cluster.evaluator.log_time import LogTime
from betrace.service.cluster.evaluator.stragglers import split_again
from betrace.service.otlp.columns import TRACE_HI, TRACE_LO
from betrace.service.otlp.partition import partition_numbers, partition_of
from betrace.service.otlp.wire import scan_bodies
from betrace.service.rules.parse import parse
from betrace.service.storage.jetstream.envelope import Seal, Spans, TenantFrame, pack, unpack
from betrace.service.storage.jetstream.generations import Generation
from betrace.service.storage.jetstream.stream_log import LogMessage
from tests.service.cluster.evaluator.test_determinism import (
    FOLDED,
    RELATED,
    TENANTS,
    contents,
    events,
)
from tests.support.engine import active
from tests.support.examples import examples
from tests.support.oracle import OracleSpan, breach
from tests.support.partition_world import MS, SECOND, Owner
from tests.support.resized_world import ResizedWorld
from tests.support.spans import S, body

pytestmark = pytest.mark.kernel

TRACES = [bytes([i]) * 16 for i in range(1, 40)]


def run(script, start: int, cut: int, sizes: tuple[int, ...], random: Random) -> ResizedWorld:
    """Play a script, and resize the cluster in the middle."""
    world = ResizedWorld(start)
    for tenant in TENANTS:
        world.rules(tenant, *FOLDED, *RELATED)
    stale = None
    for number, event in enumerate([*script, ("end",)]):
        if number >= cut and sizes:
            former = world.generations.current
            world.grow(sizes[0])
            sizes = sizes[1:]
            world.prepare()
            for _ in range(random.randint(0, 3)):  # edges know it, and the seals are to come
                spans = {"t": [S(random.randint(1, 12), trace=random.choice(TRACES[:6]))]}
                world.spans(spans, stale=random.choice([None, former]))
            world.seal()
            stale = former
        match event:
            case "spans", spans, after:
                world.spans(spans, after, random.choice([None, stale]))
            case "quiet", seconds:
                world.quiet(seconds)
        if stale is not None:
            world.forward_new()
        if random.random() < 0.5:
            world.finish()
    world.quiet(4)
    world.finish()
    return world


def expected_of(world: ResizedWorld) -> set[tuple[str, str, str]]:
    traces: dict[tuple[str, bytes], list[OracleSpan]] = {}
    for tenant, s in world.sent:
        span = OracleSpan(s.name, s.trace, s.id.to_bytes(8, "big"), s.start, s.end)
        span.attributes.update({"x": s.x} if s.x is not None else {})
        traces.setdefault((tenant, s.trace), []).append(span)
    return {
        (of, trace.hex(), f"r{i}")
        for (of, trace), spans in traces.items()
        for i, rule in enumerate(FOLDED)
        if breach(parse(rule), spans)
    }


def found_of(world: ResizedWorld) -> set[tuple[str, str, str]]:
    return {
        (tenant, *each[:2])
        for tenant in TENANTS
        for each in active([s for s in world.signals if s.tenant == tenant])
    }


@settings(max_examples=examples(25), deadline=None)
@given(events(), st.integers(0, 25), st.sampled_from([(4,), (6,), (4, 8)]), st.integers(0, 2**32))
def test_signals_are_those_of_the_oracle_after_a_change(script, cut, sizes, seed):
    world = run(script, 2, cut, sizes, Random(seed))
    found = found_of(world)
    folded = {f"r{i}" for i in range(len(FOLDED))}
    assert {each for each in found if each[2] in folded} == expected_of(world)
    whole = ResizedWorld(1)  # never resized
    for tenant in TENANTS:
        whole.rules(tenant, *FOLDED, *RELATED)
    for tenant, span in world.sent:
        whole.spans({tenant: [span]})
    whole.quiet(4)
    whole.finish()
    assert found_of(whole) == found
    ids = [signal.id for signal in world.signals]
    assert len(ids) == len(set(ids))
    for partition in world.generations.current.partitions:
        again = Owner(world.parts[partition])  # without any checkpoint
        again.finish()
        same = contents(again.state) == contents(world.owners[partition].state)
        assert same  # pytest would compare megabytes line by line
    assert len(world.signals) == len(ids)


def test_open_and_closed_traces_rules_and_late_spans_are_passed_on():
    world = ResizedWorld(2)
    world.rules("t", "count(a) == 2")
    world.spans({"t": [S(1, trace=trace) for trace in TRACES]})
    world.quiet(1)
    world.finish()
    open_before = {p: world.owners[p].state.engine.traces.open_count for p in (0, 1)}
    world.grow(6)
    world.prepare()
    world.seal()
    traces = [world.owners[p].state.engine.traces.open_count for p in range(2, 8)]
    assert sum(traces) == sum(open_before.values()) == len(TRACES)
    for trace in TRACES:
        partition = 2 + partition_of("t", trace, 6)
        assert world.owners[partition].state.look_up("t", trace.hex()) is not None
    assert world.owners[2].state.rules_revisions == {"t": 1}
    world.spans({"t": [S(2, trace=TRACES[0])]})
    world.quiet(0.9)  # the traces were idle for less than 2 s in all
    world.finish()
    assert not world.closed
    world.quiet(3)
    world.finish()
    assert len(world.closed) == len(TRACES)
    assert [(s.trace_id, s.kind) for s in world.signals] == [(TRACES[0].hex(), "raised")]
    world.quiet(30)  # they leave memory
    world.finish()
    world.spans({"t": [S(3, trace=TRACES[0]), S(2, trace=TRACES[1])]})
    world.quiet(3)
    world.finish()
    assert active(world.signals) == {(TRACES[1].hex(), "r0")}
    assert not any(found.undecided for part in world.parts.values() for found in part.outputs)


def test_what_follows_the_seal_is_not_applied_and_a_second_seal_changes_nothing():
    world = ResizedWorld(1)
    world.rules("t", "count(a) == 2")
    world.spans({"t": [S(1)]})
    world.grow(2)
    world.prepare()
    world.seal()
    owner, sealed = world.owners[0], world.owners[0].state.applied
    world.spans({"t": [S(2)]}, stale=world.generations.listed[0])
    world.parts[0].append(pack(Seal()))
    owner.apply()
    assert owner.state.applied == sealed
    assert owner.state.at_rest
    restored = Owner(world.parts[0], owner.state.snapshot(len(world.parts[0].out)))
    restored.apply()
    assert restored.state.sealed
    assert restored.state.applied == sealed


def test_a_state_of_an_unfinished_partition_cannot_be_inherited():
    world = ResizedWorld(1)
    world.rules("t", "count(a) == 2")
    world.finish()
    early = world.owners[0].state.snapshot(0)
    world.grow(2)
    world.prepare()
    world.seal()
    world.final[0] = early
    with pytest.raises(ValueError, match="not that of a finished partition"):
        Owner(world.parts[1])
    world.final[0] = early[:50]
    with pytest.raises(ValueError, match="damaged"):
        Owner(world.parts[1])


def test_a_trace_read_again_has_the_rules_of_its_first_span_in_the_former_partition():
    world = ResizedWorld(1)
    world.rules("t", "count(a) == 2")
    world.spans({"t": [S(1)]})
    world.quiet(30)  # it leaves memory
    world.rules("t", "count(a) == 3")
    world.finish()
    world.grow(2)
    world.prepare()
    world.seal()
    world.spans({"t": [S(2)]})
    world.quiet(3)
    world.finish()
    assert [(s.rule_id, s.kind) for s in world.signals] == [("r0", "raised")]


def test_the_time_of_messages_that_came_before_the_parents_seal_has_passed():
    parent = LogTime()
    parent.advance(100 * SECOND)
    parent.advance(110 * SECOND)
    clock = LogTime()
    clock.inherit(parent.saved())
    now = clock.now_ns
    for at in (108, 109, 108.5):
        assert clock.advance(int(at * SECOND)) == 0
    again = LogTime()
    again.restore(clock.saved())
    for each in (clock, again):
        assert each.advance(111 * SECOND) == SECOND
        assert each.now_ns == now + SECOND
        assert each.advance(109 * SECOND) == 0
        assert each.advance(110 * SECOND) == SECOND  # now it is a clock that was set back
    clock.inherit(parent.saved())
    clock.advance(10 * SECOND)
    assert clock.advance(11 * SECOND) == SECOND
    former = LogTime()
    former.restore([5 * MS, 6 * MS])
    assert former.advance(7 * MS) == MS


def test_a_tenant_that_was_created_again_is_in_the_partition_that_edges_choose():
    spans = [S(n, trace=trace) for n, trace in enumerate(TRACES, 1)]
    frame = TenantFrame("t=5", 7, len(spans), body(*spans))
    current = Generation(3, 6)
    found = split_again(LogMessage(1, 2, pack(Spans([frame, frame_of("u")]))), current)
    seen = set()
    for partition, data in found:
        content = unpack(data)
        for each in content.frames:
            assert each.received_ns == 7
            for row in scan_bodies(each.tenant, [each.body]).spans[:, [TRACE_HI, TRACE_LO]]:
                trace = row.astype(">i8").tobytes()
                assert partition == current.partition_of(each.tenant.partition("=")[0], trace)
                seen.add((each.tenant, trace))
    assert seen == {("t=5", trace) for trace in TRACES} | {("u", TRACES[0])}
    assert split_again(LogMessage(1, 2, b"damaged"), current) == []
    assert split_again(LogMessage(1, 2, pack(Seal())), current) == []


def frame_of(tenant: str) -> TenantFrame:
    return TenantFrame(tenant, 7, 1, body(S(1, trace=TRACES[0])))


def test_each_partition_of_a_multiple_has_one_parent():
    ids = np.random.default_rng(1).integers(-(2**63), 2**63, (1000, 2), np.int64)
    four, twelve = (partition_numbers("t", ids, number) for number in (4, 12))
    assert (twelve % 4 == four).all()
    trace = ids[:1].astype(">i8").tobytes()
    assert partition_of("t", trace, 12) == twelve[0]
