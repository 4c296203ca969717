"""The log: a line for each change of state, in each of its forms, and the page that lists them."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import trio

from betrace.channels import ExpectedError, Stage, StageOptions, ThreadRunner, open_channel
from betrace.service.cli.docs import events as events_docs
from betrace.service.config.edge import Ingest, Logging
from betrace.service.pipeline.log_sync import GroupSync
from betrace.service.pipeline.pipeline import MeasuredChannel
from betrace.service.pipeline.watch import QUIET_SECONDS, Watch
from betrace.service.receiver.admission import Admission
from betrace.service.storage.spanlog.log import LogSyncError
from betrace.service.telemetry import events
from betrace.service.telemetry.events import DECLARED, Event, EventFields
from betrace.service.telemetry.logs import set_up_logging
from betrace.service.tenancy.quotas import SpanQuotas
from tests.support.inprocess import closed, folded, running, send, settings, write_rules
from tests.support.loggers import restored
from tests.support.spans import S

ROOT = Path(__file__).parents[3]


@pytest.fixture
def logged(caplog):
    """The events so far, as (name, fields)."""
    caplog.set_level(logging.INFO, "service")

    def found() -> list[tuple[str, dict[str, Any]]]:
        kept = (getattr(record, "event", None) for record in caplog.records)
        return [(each.name, each.fields) for each in kept if isinstance(each, EventFields)]

    return found


@pytest.fixture
def log_of():
    with restored():
        yield lambda form: set_up_logging(Logging(format=form))


def test_the_page_of_the_log_is_current():
    page = (ROOT / "docs/logging.md").read_text("utf-8")
    assert page == events_docs.markdown(), (
        "python -m betrace.service.cli.docs.events > docs/logging.md"
    )


def test_names_are_used_once_and_every_event_is_used():
    names = [event.name for event in DECLARED]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z_]+\.[a-z_]+", name) for name in names)
    code = "".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    for constant, event in vars(events).items():
        if isinstance(event, Event):
            assert re.search(rf"\bevents\.{constant}\b", code), constant


def test_an_event_requires_its_fields():
    with pytest.raises(TypeError, match=r"stage\.stalled has the fields"):
        events.STAGE_STALLED(stage="x")


def test_json_has_the_fields_of_an_event(capsys, log_of):
    log_of("json")
    events.STAGE_STALLED(stage="projection", size=3, unit="rows", seconds=30.0)
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "error",
        "logger": "service.events",
        "event": "stage.stalled",
        "message": "the stage projection has 3 rows waiting and has finished none for 30 s",
        "stage": "projection",
        "size": 3,
        "unit": "rows",
        "seconds": 30.0,
    }


def test_values_that_json_lacks_become_text(capsys, log_of):
    log_of("json")
    events.CHECKPOINT_FAILED(error=OSError(28, "No space left on device"))
    assert json.loads(capsys.readouterr().err)["error"] == "[Errno 28] No space left on device"


def test_logfmt_is_one_line_of_pairs(capsys, log_of):
    log_of("logfmt")
    events.RULES_BROKEN(problem='rules.yaml:3: "a" is\nwrong')
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("service.test").exception("a defect")
    first, second = capsys.readouterr().err.splitlines()
    assert re.match(r'time=\S+Z level=warning logger=service.events event=rules.broken "?me', first)
    assert "problem=" in first
    pairs = dict(each.partition("=")[::2] for each in shlex.split(second))
    assert pairs["level"] == "error"
    assert pairs["message"] == "a defect"
    assert "ValueError: why" in pairs["exception"]


def test_text_is_for_people(capsys, log_of):
    log_of("text")
    events.RULES_CHANGED(tenants="acme")
    line = capsys.readouterr().err
    assert line.endswith("INFO    service.events: rules changed: acme\n")


async def test_changes_of_state_are_logged_and_spans_are_not(tmp_path, logged):
    write_rules(tmp_path, {"r": "never { a }"})
    async with running(settings(tmp_path)) as service:
        for _ in range(20):
            await send(service, [S(1), S(2), S(3)])
        await folded(service)
        (tmp_path / "rules/default/bad.yaml").write_text("rules: 7")
        await service.reload_rules()
        await service.reload_rules()
        (tmp_path / "rules/default/bad.yaml").unlink()
        await service.reload_rules()
        service.pipeline.breakers.ledger.trip()
        service.pipeline.breakers.ledger.reset()
        await closed(service)
    names = [name for name, _ in logged()]
    assert names == [
        "service.starting",
        "service.ready",
        "rules.broken",
        "rules.mended",
        "breaker.opened",
        "breaker.changed",
        "service.draining",
        "service.stopped",
    ]
    fields = dict(logged())
    assert fields["service.stopped"]["left"] == 0
    assert fields["breaker.opened"]["breaker"] == "ledger"
    assert fields["service.ready"]["ingest"] is None


async def test_consecutive_checkpoint_failures_are_logged_once(tmp_path, logged, monkeypatch):
    async with running(settings(tmp_path)) as service:

        def fail(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr("betrace.service.pipeline.recovery.recovery.write_checkpoint", fail)
            for _ in range(3):
                assert not await service.recovery.save()
        assert await service.recovery.save()
    found = [(name, fields) for name, fields in logged() if name.startswith("checkpoint")]
    assert [name for name, _ in found] == ["checkpoint.failed", "checkpoint.recovered"]
    assert found[1][1]["failures"] >= 3  # the first of the service itself may be among them


def watched() -> tuple[Watch, Admission, Any, Any]:
    send, receive = open_channel("stage", 10, lambda item: 1, hold=True)

    async def handle(batch: list[object]) -> None:
        await trio.sleep(60)

    async def bury(*_: object) -> None:
        raise AssertionError

    stage: Stage[object] = Stage("stage", receive, handle, StageOptions(on_dead=bury))
    queue = MeasuredChannel(send, receive, send.peak_reader(), send.peak_reader(), "spans")
    admission = Admission(Ingest(), send, SpanQuotas(0, 10, {}, 10))
    return (
        Watch(
            {"stage": stage},
            {"stage": queue},
            admission.refusals.requests,
            admission.refusals.spans,
            30,
        ),
        admission,
        stage,
        send,
    )


async def test_a_stall_and_its_end_are_logged_once(autojump_clock, logged):
    watch, _, stage, send = watched()
    async with trio.open_nursery() as nursery:
        await nursery.start(stage.run)
        nursery.start_soon(watch.run)
        await send.send(object())
        await trio.sleep(25)
        assert logged() == []
        await trio.sleep(30)
        assert [name for name, _ in logged()] == ["stage.stalled"]
        await trio.sleep(10)
        assert [name for name, _ in logged()] == ["stage.stalled", "stage.recovered"]
        nursery.cancel_scope.cancel()


async def test_refusals_are_logged_once_per_episode(autojump_clock, logged):
    watch, admission, _, _ = watched()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(1.5)
        for _ in range(30):
            admission.refusals.requests["overloaded"] += 10
            admission.refusals.spans["overloaded"] += 1000
            admission.refusals.requests["not_found"] += 1  # a client's fault, no state
            await trio.sleep(1)
        assert logged() == [("ingestion.refusing", {"reason": "overloaded"})]
        await trio.sleep(QUIET_SECONDS + 1)
        name, fields = logged()[-1]
        assert name == "ingestion.accepting"
        assert fields == {
            "reason": "overloaded",
            "requests": 300,
            "spans": 30_000,
            "seconds": pytest.approx(29, abs=1.1),
        }
        nursery.cancel_scope.cancel()
    assert len(logged()) == 2


async def test_consecutive_sync_failures_are_logged_once(logged):
    class Log:
        broken = True

        def sync(self, _: Any) -> None:
            if self.broken:
                raise LogSyncError(["a"], OSError(5, "Input/output error"))

    log = Log()
    with ThreadRunner("sync", 1) as threads:
        sync = GroupSync(log, threads)
        for _ in range(3):
            with pytest.raises(LogSyncError):
                await sync.sync(["a"])
        log.broken = False
        await sync.sync(["a"])
        await sync.sync(["a"])
    assert [name for name, _ in logged()] == ["log.sync_failed", "log.sync_recovered"]
    assert logged()[1][1] == {"failures": 3}


async def test_many_dead_letters_take_few_lines(tmp_path, logged, monkeypatch):
    write_rules(tmp_path, {"r": "never { a }"})
    once = {"attempts": 0}
    async with running(settings(tmp_path, redelivery=once)) as service:

        def fail(*_: Any) -> Any:
            raise ExpectedError("on purpose")

        monkeypatch.setattr("betrace.service.pipeline.stages.evaluate.decide_due", fail)
        for number in range(1, 11):
            await send(service, [S(number)], f"tenant-{number}")
        with trio.fail_after(60):
            while service.pipeline.letters.book.total < 10:
                await trio.sleep(0.02)
    kept = [fields for name, fields in logged() if name == "dead_letters.kept"]
    assert 1 <= len(kept) < 10
    assert kept[0]["stage"] == "rule-evaluation"
    assert "on purpose" in kept[0]["error"]
