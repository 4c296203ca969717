"""Evaluators with real states on a real NATS server: every signal is stored exactly once while
owners are killed, frozen, stopped and replaced."""

from __future__ import annotations

import pytest
import trio

from tests.support.nats_servers import MISSING, PROGRAM, NatsServers
from tests.support.owners_on_nats import OwnersOnNats, current, on_a_server, wait_until


@on_a_server
async def test_a_restarted_evaluator_continues_where_the_killed_one_was(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    await cluster.send_traces(50)
    await trio.sleep(1)
    one.kill()
    await one.ended.wait()
    await cluster.send_traces(50)
    two = await cluster.start("one")
    await wait_until(current(two))
    await cluster.send_traces(50)
    await cluster.check()


@pytest.mark.slow
async def test_nothing_is_lost_or_doubled_without_leaders_and_without_a_quorum(tmp_path):
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path, 3) as servers:
        await on_a_server(_kill_leaders)(servers)


async def _kill_leaders(cluster: OwnersOnNats) -> None:
    one = await cluster.start("one")
    two = await cluster.start("two")
    await wait_until(current(one, two))
    await cluster.rules_are_known()
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        await trio.sleep(1)
        for stream in (cluster.layout.spans_stream(0), cluster.layout.out_stream(1)):
            leader = await trio.to_thread.run_sync(cluster.servers.leader, stream)
            await trio.to_thread.run_sync(leader.restart)
            await trio.to_thread.run_sync(cluster.servers.wait_healthy)
            await trio.sleep(1)
        for server in cluster.servers.servers[1:]:
            await trio.to_thread.run_sync(server.kill)
        await trio.sleep(3)
        for server in cluster.servers.servers[1:]:
            await trio.to_thread.run_sync(server.start)
        await trio.to_thread.run_sync(cluster.servers.wait_healthy)
        await cluster.send_traces(20)
        sent.set()
    await cluster.check()
    assert {"one", "two"} == set(one.evaluator._membership.alive())
