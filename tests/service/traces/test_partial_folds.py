"""Folds that fail in the middle: each span counts once, and nothing that is due is lost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from betrace.service.otlp.columns import SpanBatch
from betrace.service.otlp.wire import scan_bodies
from betrace.service.traces import partial_folds
from betrace.service.traces.partial_folds import PartialFolds, TenantPartialFolds
from tests.support.failing_folds import World
from tests.support.spans import TRACE, S, body

pytestmark = pytest.mark.kernel

NAMES = ("a", "a", "b", "db.get", "db.put", "n1", "n2", "n3", "e" * 5000)

spans = st.lists(
    st.builds(
        dict,
        name=st.sampled_from(NAMES),
        trace=st.integers(1, 4).map(lambda n: bytes([n]) * 16),
        start=st.integers(1, 9),
        x=st.sampled_from([None, "v1", "v2", "w"]),
        service=st.sampled_from(["", "shop"]),
        complete=st.sampled_from([False] * 9 + [True]),
    ),
    min_size=1,
    max_size=6,
)
faults = st.tuples(st.integers(0, 60), st.integers(0, 4))
steps = st.one_of(
    st.tuples(st.just("send"), st.lists(spans, min_size=1, max_size=4), st.integers(1, 3), faults),
    st.tuples(st.just("retry"), st.integers(1, 2), faults),
    st.tuples(st.just("close"), st.sampled_from([0, 3]), faults),
    st.tuples(st.sampled_from(["forget", "checkpoint", "crash", "new_rules"])),
)


@given(st.lists(steps, min_size=1, max_size=8))
def test_any_step_may_fail_before_and_after_restarts(stream):
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        with world.fault.everywhere():
            world.crash()
            number = 0
            for what, *arguments in stream:
                if arguments and isinstance(arguments[-1], tuple):
                    world.fault.arm(*arguments.pop())
                if what == "send":
                    requests = []
                    for request in arguments[0]:
                        requests.append([S(number + k + 1, **s) for k, s in enumerate(request)])
                        number += len(request)
                    arguments[0] = requests
                getattr(world, what)(*arguments)
                world.fault.arm(0, 0)
            world.settle()
            world.check()
            if world.crashes == 1:  # a restart may read late traces twice
                assert world.repeated == 0


def requests(number: int) -> list[list[S]]:
    """Some of every case: new, known, closed and forgotten traces, names that fill the table, more
    frames than a trace can hold, comparisons in Python, traces with trace.complete."""
    ids = iter(range(number * 1000 + 1, number * 1000 + 1000))

    def trace(n: int) -> bytes:
        return bytes([n]) * 16

    return [
        [
            S(next(ids), "db.get", trace(1), x="v1"),
            S(next(ids), "a", trace(2), x="v2", service="shop"),
            S(next(ids), f"n{number}", trace(10 + number)),
            S(next(ids), "a", trace(30 + number % 2)),
            S(next(ids), "a", trace(30 + number % 2), x="v1"),
            S(next(ids), "b", trace(20 + number - 1)),
            S(next(ids), "e" * 5000, trace(1)),
        ],
        [S(next(ids), f"n{k}", trace(3), x="v1") for k in range(20)],
        *([S(next(ids), "db.put", trace(1), start=20 - k)] for k in range(10)),
        [
            S(next(ids), "a", trace(4), start=5),
            S(next(ids), "b", trace(1 + number % 4)),
            S(next(ids), "a", trace(20 + number), x="v1", complete=True),
        ],
    ]


@pytest.mark.parametrize(
    "then",
    [
        "again",
        "crash",
        pytest.param("dead letter", marks=pytest.mark.slow),
        pytest.param("dead letter, saved and crash", marks=pytest.mark.slow),
    ],
)
def test_each_step_fails_once(tmp_path, then):
    failing, met = 0, True
    while met:
        world = World(tmp_path / str(failing))
        with world.fault.everywhere():
            world.crash()
            world.send(requests(1))
            world.close()
            world.forget()
            world.send(requests(2))
            world.close(0.5)
            world.new_rules()
            assert world.checkpoint()
            world.fault.arm(failing)
            world.send(requests(3), attempts=2 if then == "again" else 1)
            met = bool(world.fault.met)
            world.fault.arm(0, 0)
            if "saved" in then:
                assert world.checkpoint()
            if "crash" in then:
                world.crash()
            world.send(requests(4))
            world.settle()
            world.check()
            assert world.repeated == 0
        failing += 1
    assert failing > 40


def test_spans_read_back_with_a_trace_are_not_folded_again(tmp_path):
    """A trace continues in a frame whose remainder is a dead letter, is forgotten and read back."""
    world = World(tmp_path)
    with world.fault.everywhere():
        world.crash()
        world.send([[S(1)], [S(2, "b")]])
        world.fault.arm(0)
        world.fault.only = "doubled"
        world.send([[S(3, "a", x="v1"), *(S(10 + k, x="v1") for k in range(90))]])
        assert world.letters == [[3]]
        assert 0 < world.spans_of(TRACE) < 93
        world.fault.arm(0, 0)
        world.close()
        world.forget()
        world.send([[S(200, "b")]])
        assert world.spans_of(TRACE) == 94
        world.settle()
        world.check()
        assert world.repeated == 0


def test_no_checkpoint_is_written_while_results_are_owed(tmp_path):
    world = World(tmp_path)
    with world.fault.everywhere():
        world.crash()
        world.send([[S(1, "b")]])
        world.fault.only = "close"
        world.fault.arm(0, 2)
        world.send([[S(2, complete=True)]])
        assert world.traces.counts.folded == 2
        assert not world.letters
        assert not world.checkpoint()
        assert not world.index
        world.close(0)
        assert world.checkpoint()
        assert world.index
        world.settle()
        world.check()


def test_the_remainder_of_frames_is_the_same_in_any_batch():
    def made(*positions: int) -> SpanBatch:
        spans = scan_bodies("t", [body(S(p), S(p + 100), S(p + 200)) for p in positions])
        spans.positions = np.array(positions)
        return spans

    folds = PartialFolds()
    together = made(1, 2, 3)
    skip = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0], np.uint8)
    folds.of("t").stopped(together, skip, [(1, "a"), (4, None)])
    restored = PartialFolds()
    restored.restore(json.loads(json.dumps(folds.saved())))
    frames = restored.of("t")
    assert len(frames) == 2  # no span of the third is folded
    found, asks = frames.remainder(made(3, 2))
    assert (found.tolist(), asks) == ([0, 0, 0, 0, 1, 0], [(4, None)])
    frames.folded(made(9, 2), np.array([0, 0, 0, 1, 1, 0], bool))
    found, asks = frames.remainder(made(2, 1))
    assert (found.tolist(), asks) == ([1, 1, 0, 1, 1, 1], [(4, "a")])
    frames.done(made(1))
    assert frames.remainder(made(1))[0].tolist() == [0, 0, 0]
    restored.forget("t")
    assert not restored.saved()


def test_only_the_newest_frames_are_remembered(monkeypatch):
    monkeypatch.setattr(partial_folds, "MOST_FRAMES", 3)
    frames = TenantPartialFolds()
    for position in (5, 1, 4, 2, 3):
        spans = scan_bodies("t", [body(S(1), S(2))])
        spans.positions = np.array([position])
        frames.stopped(spans, np.array([1, 0], np.uint8), [])
    assert sorted(position for position, *_ in frames.saved()) == [3, 4, 5]
