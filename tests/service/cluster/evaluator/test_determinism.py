"""The state is a function of the log: however messages are grouped, and wherever owners crash."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betrace.service.cluster.evaluator import snapshot as snapshots
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.config.settings import Settings
from betrace.service.rules.parse import parse
from betrace.service.traces import checkpoint
from tests.support.engine import active
from tests.support.examples import examples
from tests.support.oracle import OracleSpan, breach
from tests.support.partition_world import SETTINGS, TIGHT, Owner, PartitionWorld
from tests.support.spans import S

pytestmark = pytest.mark.kernel

FOLDED = (
    "count(a) == 2",
    "when { a } always { b }",
    'count(a.where(x matches "^v")) < 2',
    "count(*) < 4",
    "a before b",
)
RELATED = ("never { a.where(child(b)) }", "for each a as r\nnever { count(r) > 2 }")
TENANTS = ("t", "u")
TRACES = tuple(bytes([i]) * 16 for i in range(1, 6))
PAUSES = (0, 3, 30, 110, 260, 1000, 3000, 7000, -3_600_000, 3_600_000)


def some_spans() -> st.SearchStrategy[dict[str, list[S]]]:
    spans = st.builds(
        S,
        id=st.integers(1, 12),
        name=st.sampled_from(["a", "b", "c"]),
        trace=st.sampled_from(TRACES),
        start=st.integers(1, 30),
        end=st.integers(30, 40),
        parent=st.integers(0, 12),
        service=st.sampled_from(["", "s", "z"]),
        complete=st.sampled_from([False, False, False, True]),
        x=st.sampled_from([None, "v", "w"]),
    )
    return st.dictionaries(
        st.sampled_from(TENANTS), st.lists(spans, min_size=1, max_size=6), min_size=1
    )


def pauses() -> st.SearchStrategy[int]:
    return st.sampled_from(PAUSES)


def events() -> st.SearchStrategy[list[tuple[Any, ...]]]:
    sends = st.tuples(st.just("spans"), some_spans(), pauses())
    return st.lists(
        st.one_of(
            sends,
            sends,
            sends,
            st.tuples(st.just("tick"), pauses()),
            st.tuples(st.just("quiet"), st.integers(1, 12)),
            st.tuples(
                st.just("rules"),
                st.sampled_from([*TENANTS, "=all"]),
                st.integers(0, 4),
                st.integers(0, 3),
            ),
            st.just(("corrupt",)),
        ),
        min_size=1,
        max_size=25,
    )


def written(script: list[tuple[Any, ...]], options: Settings) -> PartitionWorld:
    """A world whose log has these events, and long enough time after them."""
    world = PartitionWorld(options)
    for tenant in TENANTS:
        world.rules(tenant, *FOLDED, *RELATED)
    for event in script:
        match event:
            case "spans", spans, after:
                world.spans(spans, after)
            case "tick", after:
                world.tick(after)
            case "quiet", seconds:
                world.quiet(seconds)
            case "rules", tenant, first, older:
                world.rules(
                    tenant, *FOLDED[first:], RELATED[0], revision=world.revision + 1 - older
                )
            case ("corrupt",):
                world.append(b"BTE1 nonsense")
    world.quiet(4)
    return world


def contents(state: PartitionState) -> tuple[dict[str, Any], bytes, bytes]:
    """Everything in a snapshot that the state's future depends on."""
    found = snapshots.decode(state.snapshot(0))
    header = {k: v for k, v in found.header.items() if k != "unstored"}
    traces = b"".join(checkpoint.encode(found.traces))
    return header, traces, found.filters.tobytes()


def one_by_one(
    script: list[tuple[Any, ...]], options: Settings = SETTINGS
) -> tuple[PartitionWorld, Owner]:
    world = written(script, options)
    owner = Owner(world)
    for _ in world.log:
        owner.apply(1)
        world.project()
        while owner.state.waiting is not None:
            owner.apply(0)
            world.project()
    return world, owner


@settings(max_examples=examples(25), deadline=None)
@given(events(), st.integers(0, 2**32))
def test_any_grouping_takeover_and_crash_gives_the_same(script, seed):
    random = Random(seed)
    options = TIGHT if seed % 3 == 0 else SETTINGS
    expected, first = one_by_one(script, options)
    world = written(script, options)
    assert world.log == expected.log
    owner = Owner(world)
    checkpoint_of: list[tuple[int, bytes]] = []  # usable once the step is stored
    while owner.state.applied < len(world.log):
        event = random.choice(["apply"] * 4 + ["save", "crash", "lag", "store"])
        if event == "apply":
            count = random.randint(0, 12)
            owner.apply(count, store=random.random() < 0.5)
        elif event == "store":
            owner.store()
        elif event == "lag":
            world.project(random.randint(0, 3))
        elif event == "save" and owner.state.waiting is None:
            stored = len(world.out)
            data_of = owner.state.snapshot(stored)
            checkpoint_of.append((owner.state.step, data_of))
        elif event == "crash":
            if random.random() < 0.5 and owner.waiting is not None:
                owner.store(300, parts=random.randint(0, 2))
            steps = [each.step for each in world.outputs if each.complete]
            usable = [each for at, each in checkpoint_of if at <= max(steps, default=0)]
            owner = Owner(world, random.choice([None, *usable]))
        if owner.state.waiting is not None:
            owner.store()
            world.project()
    owner.store()
    owner.finish()
    same = contents(owner.state) == contents(first.state)
    assert same  # pytest would compare megabytes line by line
    for tenant in TENANTS:
        assert world.signals_of(tenant) == expected.signals_of(tenant)
    assert sorted(set(world.closed)) == sorted(set(expected.closed))
    counts = owner.state.counts
    assert counts.evaluated + counts.dead_lettered == owner.state.applied == len(world.log)
    assert counts.dead_lettered == sum(event[0] == "corrupt" for event in script)


@settings(max_examples=examples(25), deadline=None)
@given(events())
def test_signals_are_those_of_the_oracle(script):
    world, _ = one_by_one([event for event in script if event[0] not in ("rules", "corrupt")])
    traces: dict[tuple[str, bytes], list[OracleSpan]] = {}
    for tenant, s in world.sent:
        span = OracleSpan(s.name, s.trace, s.id.to_bytes(8, "big"), s.start, s.end)
        span.attributes.update({"x": s.x} if s.x is not None else {})
        traces.setdefault((tenant, s.trace), []).append(span)
    for tenant in TENANTS:
        folded = {f"r{i}" for i in range(len(FOLDED))}
        found = active([s for s in world.signals if s.tenant == tenant])
        assert {each for each in found if each[1] in folded} == {
            (trace.hex(), f"r{i}")
            for (of, trace), spans in traces.items()
            if of == tenant
            for i, rule in enumerate(FOLDED)
            if breach(parse(rule), spans)
        }
