"""The state of a partition: time, rules, failures, late spans and takeovers, one at a time."""

from __future__ import annotations

import logging

import orjson
import pytest

from betrace.service.cluster.evaluator.decisions import Decisions
from betrace.service.cluster.evaluator.log_pace import (
    BURST_NS,
    FRAME_NS,
    SPAN_NS,
)
from betrace.service.cluster.evaluator.log_time import LogTime
from betrace.service.cluster.evaluator.partition_traces import PartitionTraces
from betrace.service.cluster.evaluator.rules import KEPT_VERSIONS, RulesInForce
from betrace.service.cluster.evaluator.state import PartitionState
from betrace.service.pipeline.open_traces import NotNow
from betrace.service.signals import Kind
from betrace.service.storage.jetstream.envelope import RulesMarker, Spans, TenantFrame, pack
from betrace.service.traces import verdicts
from betrace.service.traces.layout import FIRST_SEEN, FLAGS, PARTIAL
from betrace.service.traces.tenant_traces import TenantTraces
from tests.support.engine import active
from tests.support.partition_world import SECOND, SETTINGS, Owner, PartitionWorld, definitions
from tests.support.spans import S

pytestmark = pytest.mark.kernel

TRACES = [bytes([i]) * 16 for i in range(8)]


@pytest.fixture
def world() -> PartitionWorld:
    """A partition with a rule: a trace must not have other than two spans a."""
    found = PartitionWorld()
    found.rules("t", "count(a) != 2")
    return found


def kinds(world: PartitionWorld) -> list[tuple[str, Kind]]:
    return [(signal.rule_id, signal.kind) for signal in world.signals]


# Time


def test_a_trace_is_decided_when_it_was_idle_in_log_time(world):
    world.spans({"t": [S(1), S(2)]})
    owner = Owner(world)
    owner.apply()
    world.quiet(1.5)
    owner.apply()
    assert not world.closed
    world.quiet(1.75)
    owner.apply()
    assert [each[2] for each in world.closed] == [2]
    assert owner.state.counts.evaluated == owner.state.applied == len(world.log)


def test_each_step_of_log_time_is_clamped():
    clock = LogTime()
    clock.advance(100 * SECOND)
    assert clock.advance(101 * SECOND) == SECOND
    assert clock.advance(3701 * SECOND) == 2 * SECOND
    assert clock.advance(101 * SECOND) == 0
    assert clock.advance(101 * SECOND + 5) == 5
    assert clock.now_ns == 103 * SECOND + 5


@pytest.mark.parametrize("hours", [1, -1])
def test_neither_an_outage_nor_a_clock_that_jumps_closes_traces(world, hours):
    world.spans({"t": [S(1)]})
    world.spans({"t": [S(2)]}, after_ms=hours * 3_600_000)
    owner = Owner(world)
    owner.apply()
    assert not world.closed
    world.quiet(3)
    owner.apply()
    assert [each[2] for each in world.closed] == [2]


def test_people_see_the_time_of_the_server(world):
    world.spans({"t": [S(1)]})
    world.spans({"u": [S(1)]}, after_ms=3_600_000)
    owner = Owner(world)
    owner.apply()
    shown = owner.state.look_up("u", TRACES[1].hex())
    assert shown is not None
    assert shown.rows[0, FIRST_SEEN] == world.now_ns
    assert owner.state.look_up("u", TRACES[2].hex()) is None
    seen_ns = world.now_ns
    world.quiet(3)
    owner.apply()
    (signal,) = world.signals
    assert seen_ns < signal.detected_at <= world.now_ns
    for each in world.outputs:
        for decided in each.decided:
            if decided.tenant == "u" and decided.closed is not None:
                assert decided.closed.rows[0, FIRST_SEEN] == seen_ns


def test_few_messages_are_applied_at_once_and_many_in_groups(world):
    world.spans({"t": [S(1, complete=True)]}, after_ms=150)
    owner = Owner(world)
    owner.apply()
    assert len(world.closed) == 1  # after a pause
    world.spans({"t": [S(1, trace=TRACES[2], complete=True)]}, after_ms=5)
    owner.apply()
    assert len(world.closed) == 1
    assert owner.state.applied < owner.state.received == len(world.log)
    world.tick(after_ms=5)
    owner.apply()
    assert len(world.closed) == 2
    assert owner.state.applied == len(world.log)


def test_too_many_open_traces_are_closed_those_idle_longest_first():
    settings = SETTINGS.model_copy(
        update={"traces": SETTINGS.traces.model_copy(update={"max_open": 32})}
    )
    world = PartitionWorld(settings)  # two in each partition
    for trace in TRACES[1:6]:
        world.spans({"t": [S(1, trace=trace)]}, after_ms=200)
    Owner(world).apply()
    assert [each[1] for each in world.closed] == [trace.hex() for trace in TRACES[1:4]]


# Rules


def test_a_marker_changes_the_rules_of_new_traces(world):
    world.spans({"t": [S(1)]})
    world.rules("t", "count(a) != 1")
    world.spans({"t": [S(1, trace=TRACES[2]), S(2)]})
    world.rules("t", "count(a) != 7", revision=1)  # of a former owner
    world.spans({"t": [S(1, trace=TRACES[3])]})
    world.quiet(4)
    owner = Owner(world)
    owner.apply()
    assert not active(world.signals)  # the old rules for the first trace, then the new ones
    assert owner.state.rules_revisions == {"t": 2}
    assert owner.state.counts.markers == 3


def test_rules_for_all_tenants_come_first(world):
    world.rules("=all", "count(a) != 9")
    for tenant in ("t", "u", "v"):
        world.spans({tenant: [S(1)]})
    world.quiet(4)
    Owner(world).apply()
    found = {(s.tenant, s.rule_id, *s.counts) for s in world.signals}
    assert found == {(tenant, "r0", "a") for tenant in ("t", "u", "v")}
    assert all("9" in signal.message for signal in world.signals)  # also those of t


def test_a_rule_that_does_not_compile_is_reported_and_its_former_definition_stays(world):
    world.rules("t", "count(a) ==", "count(a) < 3")
    world.append(world.log[0].data[:-1])
    world.spans({"t": [S(1)]})
    world.quiet(4)
    owner = Owner(world)
    owner.apply()
    assert active(world.signals) == {(TRACES[1].hex(), "r0"), (TRACES[1].hex(), "r1")}
    counts = owner.state.counts
    assert (counts.bad_rules, counts.dead_lettered) == (1, 2)
    assert counts.evaluated + 2 == len(world.log)
    dead = [each for found in world.outputs for each in found.dead]
    assert [(each.sequence, each.tenant) for each in dead] == [(2, "t"), (3, "")]
    assert "r0" in dead[0].reason


def test_spans_before_the_first_marker_are_evaluated_with_its_rules():
    world = PartitionWorld()
    world.spans({"t": [S(1)]})
    marker = RulesMarker("t", 1, definitions("count(a) ==", "count(a) != 5"))
    world.append(pack(marker))
    world.spans({"t": [S(1, trace=TRACES[2])]})
    world.quiet(4)
    owner = Owner(world)
    owner.state.begin([marker])
    owner.apply(1)
    between = owner.state.snapshot(len(world.out))
    owner.apply()
    assert active(world.signals) == {(trace.hex(), "r1") for trace in TRACES[1:3]}
    assert owner.state.counts.bad_rules == 1  # reported by the marker, not twice
    successor = Owner(world, between)
    successor.apply()
    assert successor.state.counts == owner.state.counts
    assert len(active(world.signals)) == len(world.signals) == 2


# Failures


def test_frames_that_cannot_be_decoded_are_dead_letters(world):
    frames = [TenantFrame("t", 0, 1, b"\xff"), TenantFrame("u", 0, 1, b"")]
    world.append(pack(Spans(frames)))
    world.spans({"t": [S(1), S(2)]})
    world.quiet(4)
    owner = Owner(world)
    owner.apply()
    assert [each[2] for each in world.closed] == [2]
    counts = owner.state.counts
    assert (counts.dead_lettered, counts.dead_frames, counts.frames) == (1, 1, 3)


def test_a_frame_that_cannot_be_folded_does_not_stop_the_others(world, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    original = TenantTraces.fold

    def fold(self, batch, *args):
        if (batch.positions & 0xFFFF == 3).any():
            raise RuntimeError("says the test")
        return original(self, batch, *args)

    for number in range(1, 4):
        world.spans({"t": [S(number)], "u": [S(number)]}, after_ms=1)
    world.quiet(4)
    monkeypatch.setattr(TenantTraces, "fold", fold)
    owner = Owner(world)
    owner.apply()
    assert sorted(each[2] for each in world.closed) == [2, 2]
    dead = [(each.sequence, each.tenant) for found in world.outputs for each in found.dead]
    assert sorted(dead) == [(3, "t"), (3, "u")]
    assert owner.state.counts.dead_lettered == 1


def test_a_fold_that_fails_once_is_repeated(world, monkeypatch):
    failures = [MemoryError("says the test")]
    original = PartitionTraces.fold

    def fold(self, batch):
        if failures:
            raise failures.pop()
        original(self, batch)

    monkeypatch.setattr(PartitionTraces, "fold", fold)
    world.spans({"t": [S(1), S(2)]})
    world.quiet(4)
    owner = Owner(world)
    owner.apply()
    assert [each[2] for each in world.closed] == [2]
    assert not owner.state.counts.dead_lettered


def test_rules_that_cannot_be_evaluated_do_not_stop_the_others(world, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    original = verdicts.decide_due

    def decide(due, *args):
        if any(due.trace_id(k) == TRACES[2].hex() for k in range(len(due))):
            raise RuntimeError("says the test")
        return original(due, *args)

    monkeypatch.setattr("betrace.service.cluster.evaluator.decisions.decide_due", decide)
    world.spans({"t": [S(1, trace=trace) for trace in TRACES[1:4]]})
    world.quiet(4)
    owner = Owner(world)
    owner.apply()
    assert active(world.signals) == {(TRACES[k].hex(), "r0") for k in (1, 3)}
    assert len(world.closed) == 3
    assert owner.state.engine.decisions.failed == 1


def test_an_unexpected_error_makes_a_state_unusable(world, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    owner = Owner(world)
    with monkeypatch.context() as patch:
        patch.setattr(PartitionTraces, "take_due", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            owner.apply()
    with pytest.raises(RuntimeError):
        owner.apply()
    with pytest.raises(NotNow):
        owner.state.snapshot(0)


def test_a_missing_message_is_an_error(world):
    world.quiet(2)
    owner = Owner(world)
    owner.apply(1)
    with pytest.raises(ValueError, match="message 3 of partition 3"):
        owner.state.apply(world.log[2:])


# Late spans, and what is read back


def forgotten(world: PartitionWorld) -> Owner:
    """The owner after a trace of one span was closed and forgotten, and others went by."""
    world.spans({"t": [S(1)]})
    for number in range(20):
        world.spans({"t": [S(1, trace=bytes([9, number]) * 8)]}, after_ms=500)
    owner = Owner(world)
    owner.finish()
    assert owner.state.look_up("t", TRACES[1].hex()) is None
    return owner


def test_a_late_span_waits_for_the_index_and_is_never_judged_as_partial(world):
    owner = forgotten(world)
    raised = len(world.signals)
    world.project()
    world.index.reachable = False
    world.spans({"t": [S(2)]})
    world.quiet(4)
    for _ in range(3):
        owner.apply()
        assert "index" in (owner.state.waiting or "")
    assert len(world.signals) == raised
    with pytest.raises(NotNow):
        owner.state.snapshot(0)
    world.index.reachable, world.readable = True, False
    owner.apply()
    assert "log" in (owner.state.waiting or "")
    world.readable = True
    owner.finish()
    assert (TRACES[1].hex(), "r0") not in active(world.signals)
    assert owner.state.counts.recalled == 1
    assert not any(
        decided.closed.rows[:, FLAGS].any() and (decided.closed.rows[:, FLAGS] & PARTIAL).any()
        for each in world.outputs
        for decided in each.decided
        if decided.closed is not None
    )


def test_a_trace_that_is_read_again_keeps_its_rules(world):
    owner = forgotten(world)
    world.rules("t", "count(a) != 1")
    world.quiet(1)
    owner.finish()
    world.project()
    owner.store()
    successor = Owner(world, owner.state.snapshot(len(world.out)))
    world.spans({"t": [S(2)]})  # two spans break the new rule, but not the old one
    world.quiet(4)
    successor.finish()
    assert successor.state.counts.recalled == 1
    assert not [s for s in active(world.signals) if s[0] == TRACES[1].hex()]
    versions = {s.rule_version for s in world.signals if s.trace_id == TRACES[1].hex()}
    assert len(versions) == 1


def test_the_last_versions_of_rules_are_known():
    rules = RulesInForce()
    every = [f"count(a) != {number}" for number in range(KEPT_VERSIONS + 3)]
    for number, condition in enumerate(every, 1):
        assert not rules.change("t", number, definitions(condition), 10 * number)
        assert not rules.change("t", number, definitions("never { b }"), 10 * number + 1)  # again
    saved = RulesInForce()
    saved.restore(orjson.loads(orjson.dumps(rules.saved())))
    for known in (rules, saved):
        for number in range(1, len(every) + 1):
            oldest = max(number, len(every) - KEPT_VERSIONS + 1)
            for sequence in (10 * number, 10 * number + 9):
                (rule,) = known.at("t", sequence).rules
                assert rule.definition()["condition"] == every[oldest - 1]
        assert known.at("t", 10**6) is known.compiled("t")


def test_before_its_first_rules_a_tenant_has_none():
    rules = RulesInForce()
    rules.change("t", 1, definitions("never { b }"), 10)
    assert not rules.at("t", 9).rules
    assert rules.at("t", 10).rules
    rules.change("=all", 2, definitions("never { c }"), 20)
    assert len(rules.at("t", 19).rules) == 1
    assert not rules.at("u", 19).rules


def test_the_index_must_have_what_was_forgotten(world):
    owner = forgotten(world)
    assert 0 < owner.state.index_sequence <= len(world.out)
    world.index.applied = 0
    world.spans({"t": [S(2)]})
    world.tick()
    owner.apply()
    assert "are needed" in (owner.state.waiting or "")


def test_a_successor_decides_late_spans_like_its_predecessor(world):
    before = Owner(world).state.snapshot(0)
    owner = forgotten(world)
    world.spans({"t": [S(2)]})
    world.quiet(3)
    owner.finish()
    world.spans({"t": [S(3)]})
    world.quiet(3)
    owner.finish()
    world.project()  # the index has three spans of the trace, and three signals
    expected = kinds(world), world.signals_of("t"), len(world.out)
    assert [k for s, k in kinds(world)[-2:]] == [Kind.RETRACTED, Kind.RAISED]
    successor = Owner(world, before)
    successor.finish()
    assert (kinds(world), world.signals_of("t"), len(world.out)) == expected


def test_relational_rules_wait_for_a_log_that_cannot_be_read(world):
    world.rules("t", "never { a.where(not parent(b)) }")
    world.spans({"t": [S(1), S(2, "b")]}, after_ms=200)
    world.spans({"t": [S(1, parent=2, trace=TRACES[2]), S(2, "b", trace=TRACES[2])]}, after_ms=200)
    owner = Owner(world)
    owner.apply()
    world.readable = False
    world.quiet(3)
    owner.apply()
    assert owner.state.waiting is not None
    assert not world.signals
    world.readable = True
    owner.finish()
    assert active(world.signals) == {(TRACES[1].hex(), "r0")}


def test_what_no_later_span_can_undo_is_signalled_while_a_trace_is_open(world):
    world.rules("t", "never { a.where(child(b)) }")
    world.spans({"t": [S(1)]}, after_ms=200)
    world.readable = False
    world.spans({"t": [S(2, "b", parent=1)]}, after_ms=200)
    owner = Owner(world)
    owner.apply()
    assert owner.state.waiting is not None
    world.readable = True
    owner.apply()
    assert [signal.early for signal in world.signals] == [True]
    assert not world.closed
    snapshot = owner.state.snapshot(len(world.out))
    world.spans({"t": [S(3, "b", parent=1)]}, after_ms=200)
    world.quiet(3)
    successor = Owner(world, snapshot)
    successor.finish()
    assert len(world.signals) == 1
    assert not successor.state.engine.decisions.saved()["early_reading"]["known"]  # it is closed


def test_open_traces_are_read_at_the_pace_of_log_time(world):
    world.rules("t", "never { a.where(child(b)) }")
    ids = [number.to_bytes(16, "big") for number in range(1, 301)]
    for trace in ids:
        spans = [S(1, parent=0, trace=trace), S(2, "b", trace=trace)]
        world.spans({"t": spans}, after_ms=1)
    world.tick(after_ms=200)
    owner = Owner(world)
    owner.apply()
    cost = FRAME_NS + 2 * SPAN_NS
    assert BURST_NS / cost <= len(world.signals) < (BURST_NS + 10**9) / cost
    world.quiet(3)
    owner.finish()
    assert len(active(world.signals)) == len(world.signals) == 300


def test_traces_that_cannot_be_read_back_are_reported(world, monkeypatch):
    world.rules("t", "never { a.where(child(b)) }")
    world.spans({"t": [S(1), S(2, "b", parent=1)]})
    world.quiet(3)
    monkeypatch.setattr(world, "read_many", lambda tenant, positions: [])
    Owner(world).apply()
    (found,) = [each for output in world.outputs for each in output.undecided]
    assert (found.tenant, found.trace.rule_id) == ("t", "r0")
    assert found.trace.trace_id == TRACES[1].hex()


def test_few_frames_are_read_to_mark_incomplete_traces(world):
    for number in range(1, 420):
        world.spans({"t": [S(1, trace=number.to_bytes(16, "big"), parent=5)]}, after_ms=0)
    world.quiet(4)
    world.spans({"t": [S(1, trace=TRACES[7], parent=5)]})
    world.quiet(4)
    owner = Owner(world)
    owner.apply()
    assert [signal.missing_parents for signal in world.signals] == [0] * 419 + [1]
    assert owner.state.engine.decisions.unmarked == 1


# Takeovers


def test_signals_that_a_replay_does_not_make_are_retracted(world, monkeypatch):
    world.spans({"t": [S(1)]})
    world.quiet(4)
    with monkeypatch.context() as patch:  # another version of the program
        patch.setattr(Decisions, "_new", lambda self, due, signals: signals)
        Owner(world).apply()
    assert kinds(world) == [("r0", Kind.RAISED)]
    broken = len(world.out)
    with monkeypatch.context() as patch:
        patch.setattr(Decisions, "_new", lambda self, due, signals: [])
        successor = Owner(world)
        successor.finish()
    world.spans({"t": [S(2)]})
    world.quiet(4)
    successor.finish()
    assert kinds(world) == [("r0", Kind.RAISED), ("r0", Kind.RETRACTED)]
    assert len(world.out) > broken


def test_results_that_are_new_in_a_replay_are_passed_on(world, monkeypatch):
    world.spans({"t": [S(1)]})
    world.quiet(4)
    with monkeypatch.context() as patch:
        patch.setattr(Decisions, "_new", lambda self, due, signals: [])
        Owner(world).apply()
    assert not world.signals
    last = world.outputs[-1]
    Owner(world).apply()
    assert kinds(world) == [("r0", Kind.RAISED)]
    assert (world.outputs[-1].upto, world.outputs[-1].step) == (last.upto, last.step)


def test_damaged_snapshots_and_those_of_other_partitions_are_refused(world):
    owner = Owner(world)
    owner.apply()
    data = owner.state.snapshot(7)
    anchor, sequence = Owner(world).state.restore(data)
    assert (anchor.sequence, sequence) == (1, 7)
    for bad in (b"", data[:-1], data[: len(data) // 2], b"x" + data[1:]):
        with pytest.raises(ValueError, match="snapshot"):
            Owner(world).state.restore(bad)
    log: object = world
    other = PartitionState(4, 16, SETTINGS, log, world.index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="partition 3"):
        other.restore(data)


def test_long_traces_keep_all_their_positions(world):
    for number in range(30):
        world.spans({"t": [S(number + 1)]}, after_ms=100)
    world.quiet(4)
    Owner(world).apply()
    world.project()
    (row,) = world.index.find_traces("t", [TRACES[1].hex()]).values()
    assert len(row.positions) == row.spans == 30
