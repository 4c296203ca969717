"""A trace is decided by the rules in force when its first spans were appended to the log: whether
they change before a crash, or before the restart, and however often the log is read."""

from __future__ import annotations

import os
import random
import weakref
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio

from betrace.channels import TransientError
from betrace.service.pipeline.request import Done
from betrace.service.pipeline.rules_in_force import RulesOfFrames
from betrace.service.rules.definition import RuleFileError
from betrace.service.rules.parse import parse
from betrace.service.rules.registry import RuleRegistry
from betrace.service.rules.store import RuleStore
from betrace.service.signals import Kind
from betrace.service.storage.spanlog.frames import Frame
from betrace.service.storage.spanlog.log import SpanLog
from betrace.service.storage.spanlog.rule_markers import NAME, LoggedRules
from betrace.service.traces.limits import TraceLimits
from tests.support.inprocess import (
    active_signals,
    closed,
    folded,
    ledger_signals,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.oracle import OracleSpan, breach
from tests.support.spans import S

NO_B = {"no-b": "when { a } always { b }"}
NO_C = {"no-c": "when { a } always { c }"}
FOREVER = {"idle_seconds": 3600}
FORGOTTEN_SOON = {"trace_metadata_ttl_seconds": 0.001}


def trace(number: int) -> bytes:
    return bytes([number]) * 16


def a(number: int, name: str = "a", span: int = 1) -> S:
    return S(span, name, trace=trace(number))


def signal(number: int, rule: str) -> tuple[str, str]:
    return trace(number).hex(), rule


@pytest.fixture
def no_checkpoints(monkeypatch):
    """The whole log is read at every start."""

    async def save(_: Any, last: bool = False) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr("betrace.service.pipeline.recovery.recovery.Recovery.save", save)


async def test_traces_opened_before_rules_changed_keep_theirs_through_a_crash(
    tmp_path, no_checkpoints
):
    write_rules(tmp_path, NO_B)
    async with running(settings(tmp_path, traces=FOREVER), die=True) as service:
        assert await send(service, [a(1)]) == Done(1)
        await folded(service)
        write_rules(tmp_path, NO_C)
        await service.reload_rules()
        assert await send(service, [a(2)]) == Done(1)
        assert await send(service, [a(1, "x", span=2)]) == Done(1)
    for _ in range(2):
        async with running(settings(tmp_path, traces=FOREVER), die=True) as service:
            assert service.recovery.replayed.spans == 3
            await folded(service)
    async with running(settings(tmp_path)) as service:
        assert service.recovery.replayed.spans == 3
        await closed(service)
        assert active_signals(service) == {signal(1, "no-b"), signal(2, "no-c")}


@pytest.mark.parametrize("shared", [False, True], ids=["the tenant's", "of all tenants"])
async def test_rules_that_change_while_the_service_is_down_apply_to_new_spans(tmp_path, shared):
    rules = {"directory": str(tmp_path / "rules")}
    if shared:
        rules["all_tenants_directory"] = str(tmp_path / "rules" / "all")
    config = settings(tmp_path, traces=FOREVER, rules=rules)

    def write(given: dict[str, str]) -> None:
        write_rules(tmp_path, given, tenant="all" if shared else "default")

    write(NO_B)
    async with running(config, die=True) as service:
        assert await send(service, [a(1)]) == Done(1)
    write(NO_C)
    async with running(config, die=True) as service:
        assert await send(service, [a(2)]) == Done(1)
        assert await send(service, [a(1, "c", span=2)]) == Done(1)
        await folded(service)
    write(NO_B)
    config = config.model_copy(update={"traces": settings(tmp_path).traces})
    async with running(config) as service:
        await closed(service)
        assert active_signals(service) == {signal(1, "no-b"), signal(2, "no-c")}


def test_a_deleted_tenant_is_forgotten(tmp_path):
    with SpanLog(tmp_path / "log") as log:
        registry = RuleRegistry(RuleStore(tmp_path / "rules"), 10)
        rules = RulesOfFrames(log, registry)
        definitions = orjson.dumps([{"id": "r", "condition": "count(a) > 1"}])
        frame = Frame("protobuf", "", 1, b"x", 1)
        (position,) = log.append("shop", [frame], LoggedRules("v", definitions))
        found = rules.at("shop", position)
        assert found is not None
        assert found is rules.at("shop", position)
        rules.forget("other")
        gone = weakref.ref(found)
        del found
        assert gone() is not None
        rules.forget("shop")
        assert gone() is None


async def test_frames_without_a_marker_are_read_under_the_present_rules(tmp_path):
    """As after an upgrade from 0.2."""
    write_rules(tmp_path, NO_B)
    async with running(settings(tmp_path, traces=FOREVER), die=True) as service:
        assert await send(service, [a(1)]) == Done(1)
    (tmp_path / "data/default/log" / NAME).unlink()
    write_rules(tmp_path, NO_C)
    async with running(settings(tmp_path)) as service:
        await closed(service)
        assert active_signals(service) == {signal(1, "no-c")}


async def test_former_rules_that_no_longer_compile_are_reported(tmp_path, monkeypatch, caplog):
    write_rules(tmp_path, NO_B)
    async with running(settings(tmp_path, traces=FOREVER), die=True) as service:
        assert await send(service, [a(1)]) == Done(1)
    marker = tmp_path / "data/default/log" / NAME
    write_rules(tmp_path, NO_C)

    def refuse(*_: Any) -> None:
        raise RuleFileError("unknown field")

    monkeypatch.setattr("betrace.service.rules.registry.compile_definitions", refuse)
    async with running(settings(tmp_path)) as service:
        await closed(service)
        assert active_signals(service) == {signal(1, "no-c")}
    assert marker.exists()
    assert "cannot be used in this version" in caplog.text


async def test_spans_that_were_dead_letters_keep_their_rules(tmp_path, monkeypatch):
    write_rules(tmp_path, NO_B)
    redelivery = {"attempts": 0, "delay_seconds": 0.01, "transient_retry_seconds": 0.2}
    async with running(settings(tmp_path, redelivery=redelivery)) as service:
        traces, fold = service.pipeline.open_traces, service.pipeline.open_traces.fold

        def fail(*_: Any) -> None:
            raise TransientError("not now")

        monkeypatch.setattr(traces, "fold", fail)
        assert await send(service, [a(1)]) == Done(1)
        with trio.fail_after(60):
            while not service.pipeline.letters.book.totals("trace-correlation").letters:
                await trio.sleep(0.01)
        write_rules(tmp_path, NO_C)
        await service.reload_rules()
        monkeypatch.setattr(traces, "fold", fold)
        with trio.fail_after(60):
            while not active_signals(service):
                await trio.sleep(0.02)
        assert active_signals(service) == {signal(1, "no-b")}


async def test_spans_are_accepted_if_rules_cannot_be_loaded(tmp_path, monkeypatch, caplog):
    """Folding them fails until the rules can be loaded."""
    redelivery = {"attempts": 100, "delay_seconds": 0.05}
    async with running(settings(tmp_path, redelivery=redelivery)) as service:
        write_rules(tmp_path, NO_B)
        await service.reload_rules()
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise OSError("no such disk")

            patch.setattr(service.registry.store, "rules", fail)
            assert await send(service, [a(1)]) == Done(1)
        with trio.fail_after(60):
            while not active_signals(service):
                await trio.sleep(0.02)
        assert active_signals(service) == {signal(1, "no-b")}
    assert "cannot be loaded" in caplog.text


async def forgotten(service: Any) -> None:
    """Return when no trace is in memory."""
    with trio.fail_after(60):
        while any(
            each.open_count or each.closed_count
            for each in list(service.pipeline.open_traces.tenants.values())
        ):
            await trio.sleep(0.02)


@pytest.fixture
def no_lag(monkeypatch):
    """Closed traces are forgotten as soon as they are in the index."""
    limits = TraceLimits.of

    def impatient(given: Any) -> TraceLimits:
        return replace(limits(given), index_lag_ns=10**6)

    monkeypatch.setattr(TraceLimits, "of", impatient)


async def test_late_spans_reopen_a_trace_under_its_own_rules(tmp_path, no_lag):
    write_rules(tmp_path, NO_B | {"two": "count(x) > 1"})
    config = settings(tmp_path, caches=FORGOTTEN_SOON)
    async with running(config) as service:
        assert await send(service, [a(1), a(2), a(1, "x", span=5), a(4)]) == Done(4)
        await closed(service)
        await forgotten(service)
        write_rules(tmp_path, NO_C)
        await service.reload_rules()
        assert await send(service, [a(3), a(1, "x", span=6), a(2, "b", span=7)]) == Done(3)
        await closed(service)
        assert service.pipeline.history.recalled == 2
        await forgotten(service)
        expected = {signal(1, "no-b"), signal(1, "two"), signal(4, "no-b"), signal(3, "no-c")}
        assert active_signals(service) == expected
        kinds = [(s.trace_id, s.rule_id) for s in ledger_signals(service) if s.kind != Kind.RAISED]
        assert kinds == [signal(2, "no-b")]
    async with running(config) as service:
        assert await send(service, [a(1, "b", span=8)]) == Done(1)
        await closed(service)
        assert active_signals(service) == expected - {signal(1, "no-b")}


# Any sequence of changes, closings, checkpoints and crashes

VERSIONS = [
    {"many": "count(a) > 2", "no-b": "when { a } always { b }", "few": "count(a) < 2"},
    {"many": "count(a) > 1", "no-b": "when { a } always { b }", "more-a": "count(a) > count(b)"},
    {"few": "count(b) < 1", "two": "count(a) == 2"},
]


@dataclass
class Model:
    """What was sent: for each trace, its rules and the spans of each request, in order."""

    version: int = 0
    rules: dict[bytes, dict[str, str]] = field(default_factory=dict)
    requests: dict[bytes, list[list[S]]] = field(default_factory=dict)

    def sent(self, spans: list[S]) -> None:
        for each in {span.trace for span in spans}:
            self.rules.setdefault(each, VERSIONS[self.version])
            own = [span for span in spans if span.trace == each]
            self.requests.setdefault(each, []).append(own)

    def verdicts(self, each: bytes) -> dict[str, list[bool]]:
        """By rule: whether it is broken after each request."""
        found: dict[str, list[bool]] = {rule: [] for rule in self.rules[each]}
        spans: list[OracleSpan] = []
        for request in self.requests[each]:
            spans += [
                OracleSpan(span.name, span.trace, span.id.to_bytes(8, "big"), span.start, span.end)
                for span in request
            ]
            for rule, text in self.rules[each].items():
                found[rule].append(bool(breach(parse(text), spans)))
        return found

    def check(self, service: Any) -> None:
        """The active signals are those of the whole traces, and no signal was raised or retracted
        that the spans so far did not justify, in their order."""
        active = set()
        changes: dict[tuple[str, str], int] = {}
        for found in ledger_signals(service):
            name = found.trace_id, found.rule_id
            changes[name] = changes.get(name, 0) + 1
        for each in self.rules:
            for rule, verdicts in self.verdicts(each).items():
                name = each.hex(), rule
                if verdicts[-1]:
                    active.add(name)
                most = sum(before != after for before, after in pairwise([False, *verdicts]))
                assert changes.pop(name, 0) <= most, (name, verdicts)
        assert active_signals(service) == active
        assert not changes, "signals of rules that were never the trace's"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("BETRACE_CRASHES", "2"))))
async def test_any_interleaving_of_rule_changes_closings_and_crashes(
    tmp_path: Path, no_lag: None, seed: int
) -> None:
    rng = random.Random(seed)
    model = Model()
    number = 0
    caches = FORGOTTEN_SOON if rng.random() < 0.7 else {}
    config = settings(tmp_path, traces={"idle_seconds": rng.choice([0.1, 0.2])}, caches=caches)

    def change() -> None:
        model.version = rng.randrange(len(VERSIONS))
        write_rules(tmp_path, VERSIONS[model.version])

    change()
    for _ in range(4):
        if rng.random() < 0.5:
            change()  # while the service is down
        async with running(config, die=rng.random() < 0.8) as service:
            for _ in range(rng.randrange(1, 7)):
                spans = []
                for _ in range(rng.randrange(1, 4)):
                    number += 1
                    spans.append(S(number, rng.choice("aab"), trace=trace(rng.randrange(1, 9))))
                assert await send(service, spans) == Done(len(spans))
                model.sent(spans)
                match rng.choice(["change", "fold", "close", "forget", "save", "nothing"]):
                    case "change":
                        change()
                        await service.reload_rules()
                    case "fold":
                        await folded(service)
                    case "close":
                        await closed(service)
                    case "forget":
                        await (forgotten if caches else closed)(service)
                    case "save":
                        with trio.fail_after(60):
                            assert await service.recovery.save()
    async with running(config) as service:
        await closed(service)
        model.check(service)
