"""Late spans acknowledged just before a crash find their trace, which was closed long before."""

from __future__ import annotations

import duckdb
import pytest
import trio

from betrace.service.pipeline.recovery import recovery
from betrace.service.pipeline.request import Done
from tests.support.inprocess import active_signals, closed, running, send, settings, write_rules
from tests.support.spans import TRACE, S

pytestmark = pytest.mark.slow


async def forgotten(service):
    """Return when the trace has its signal and is no longer in memory."""
    with trio.fail_after(60):
        while active_signals(service) != {(TRACE.hex(), "no-b")}:
            await trio.sleep(0.05)
        while any(traces.closed_count for traces in service.pipeline.open_traces.tenants.values()):
            await trio.sleep(0.1)


@pytest.mark.parametrize(
    ("most", "file", "found"),
    [(2_000_000, False, True), (0, False, False), (0, True, True)],
)
async def test_a_trace_closed_days_before_a_restart_is_found(
    tmp_path, monkeypatch, most, file, found
):
    """It is found in the filter that the last process saved. Without it, the traces of the index
    are remembered, unless they are too many; then those of the last hour."""
    monkeypatch.setattr(recovery, "_REMEMBERED", most)
    write_rules(tmp_path, {"no-b": "when { a } always { b }"})
    config = settings(tmp_path, caches={"trace_metadata_ttl_seconds": 0.1})
    async with running(config) as service:
        assert await send(service, [S(1, "a")]) == Done(1)
        await forgotten(service)
    nine_days = 9 * 86_400 * 10**9
    with duckdb.connect(str(config.storage.path / "default/betrace.duckdb")) as db:
        db.execute(f"UPDATE traces SET last_seen_ns = last_seen_ns - {nine_days}")
    saved = config.storage.path / "checkpoints" / recovery.FILTER
    assert saved.stat().st_mode & 0o777 == 0o600
    if not file:
        saved.unlink()
    async with running(config) as service:
        assert await send(service, [S(2, "b")]) == Done(1)
        await closed(service)
        assert (active_signals(service) == set()) is found


async def test_a_late_span_in_the_tail_of_the_log(tmp_path):
    write_rules(tmp_path, {"no-b": "when { a } always { b }"})
    config = settings(tmp_path, caches={"trace_metadata_ttl_seconds": 0.1})
    async with running(config, die=True) as service:
        assert await send(service, [S(1, "a")]) == Done(1)
        await forgotten(service)
        assert await service.recovery.save()
        assert await send(service, [S(2, "b")]) == Done(1)
    async with running(config) as service:
        await closed(service)
        assert active_signals(service) == set()
        found = await trio.to_thread.run_sync(service.store.find_traces, "default", [TRACE.hex()])
        assert found[TRACE.hex()].spans == 2
