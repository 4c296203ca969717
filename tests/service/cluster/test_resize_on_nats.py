"""Growth on a real NATS server under load: evaluators come and go, and partitions are multiplied.
Nothing is lost and nothing doubled."""

from __future__ import annotations

import pytest
import trio

from betrace.service.cluster.evaluator.stragglers import forwarded_key
from betrace.service.storage.jetstream import resize
from betrace.service.storage.jetstream.bucket import ConfigBucket
from tests.support.cluster_load import WAIT
from tests.support.owners_on_nats import current, wait_until, with_partitions

pytestmark = pytest.mark.slow


@with_partitions(16)
async def test_16_to_32_partitions_and_1_to_4_to_2_evaluators_under_load(cluster):
    one = await cluster.start("one")
    await wait_until(current(one))
    await cluster.rules_are_known()
    sent = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.send_until, sent)
        await trio.sleep(0.5)
        nodes = [one, *[await cluster.start(name) for name in ("two", "three", "four")]]
        await wait_until(current(*nodes))
        kept = [one.evaluator.statuses[partition] for partition in one.owned]
        assert len(kept) == 4
        assert all(status.takeovers == 1 for status in kept)  # only moved partitions paused

        await cluster.resize(32)
        await trio.sleep(0.3)
        nodes.pop().kill()  # in the middle of the change
        await wait_until(current(*nodes))
        assert await resize.progress(cluster.client, cluster.settings) == (cluster.generations, [])
        await stragglers_are_forwarded(cluster)
        cluster.stale = None

        one.evaluator.stop()
        await one.ended.wait()
        two, three = nodes[1:]
        await wait_until(current(two, three))
        sent.set()
    await cluster.check()
    assert len(two.owned) == len(three.owned) == 16


async def stragglers_are_forwarded(cluster) -> None:
    config = ConfigBucket(cluster.client, cluster.layout.config_bucket)
    with trio.fail_after(WAIT):
        for partition in range(16):
            while await config.get(forwarded_key(partition)) is None:
                await trio.sleep(0.05)
