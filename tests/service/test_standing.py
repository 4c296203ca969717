"""What stands in the end is what the oracle says, whatever failed, died or came late between."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from channels import TransientError
from service.http.request import Done
from service.stages.correlate import CorrelateStage
from tests.service.inprocess import (
    closed,
    running,
    send,
    settings,
    standing,
    write_rules,
)
from tests.service.traces.spans import TRACE, S

TRACE_ID = TRACE.hex()


class Fault:
    """While ``on``, spans cannot be folded."""

    on = False


@pytest.fixture
def fold_fault(monkeypatch):
    fault = Fault()
    fold = CorrelateStage._fold_one

    def fail(self: CorrelateStage, batch: Any) -> Any:
        if fault.on:
            raise TransientError("these spans do not fold, says the test")
        return fold(self, batch)

    monkeypatch.setattr(CorrelateStage, "_fold_one", fail)
    return fault


async def dead(service, spans):
    """Return when so many spans are in dead letters and none under way."""
    with trio.fail_after(20):
        while service.pipeline.letters.spans < spans or service.spans_in_flight():
            await trio.sleep(0.01)


async def test_a_breach_undone_by_spans_that_were_dead_letters_before_and_after_a_crash(
    tmp_path, fold_fault
):
    """All of the trace comes after the last checkpoint, its breach is stored, and when the log is
    read again all its spans become dead letters: no trace is open when the replay is done."""
    write_rules(tmp_path, {"no-b": "when { a } always { b }"})
    retry = {"attempts": 1, "delay_seconds": 0.01, "transient_retry_seconds": 3600}
    config = settings(tmp_path, redelivery=retry)
    async with running(config, die=True) as service:
        await send(service, [S(9, "other", trace=bytes(15) + b"9")])
        await closed(service)
        assert await service.recovery.save()
        await send(service, [S(1, "a")])
        await closed(service)
        assert standing(service) == {(TRACE_ID, "no-b")}
        fold_fault.on = True
        assert await send(service, [S(2, "b")]) == Done(1)
        await dead(service, 1)
    async with running(config) as service:
        await dead(service, 2)
        fold_fault.on = False
        await service.pipeline.letters.retry()
        with trio.fail_after(20):
            while service.pipeline.letters.spans:
                await trio.sleep(0.01)
        await closed(service)
        assert standing(service) == set()
