"""A cluster's identity, and copies of its configuration."""

from __future__ import annotations

from datetime import date

import pytest

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.archive_progress import (
    ArchiveProgress,
    read_progress,
    write_progress,
)
from betrace.service.storage.jetstream.bucket import Conflict
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.configuration import (
    CommonBuckets,
    NoConfiguration,
    cluster_id,
    read_configuration,
    write_configuration,
)
from betrace.service.storage.jetstream.layout import Layout
from tests.support.nats_servers import NatsServers, connected


@pytest.fixture
def buckets(client: NatsClient, settings: ClusterSettings) -> CommonBuckets:
    return CommonBuckets.of(client, Layout.of(settings))


async def test_a_new_cluster_gets_what_the_old_one_had(
    buckets: CommonBuckets, settings: ClusterSettings, one_server: NatsServers
) -> None:
    first = await cluster_id(buckets.config)
    assert await cluster_id(buckets.config) == first
    for key, value in (("rules.acme", b"[1]"), ("rules.beta", b"[2]"), ("rules.gone", b"x")):
        await buckets.config.put(key, value)
    await buckets.config.put("archive", b"progress")
    await buckets.config.delete("rules.gone")
    await buckets.query.put("triage.acme.x", b"muted")
    await buckets.query.put("sent.webhook", b"progress")
    copy = await read_configuration(buckets)
    assert (await write_configuration(buckets, copy)).same_cluster
    other = one_server.settings(prefix=f"{settings.prefix}b")
    async with connected(other) as client:
        theirs = CommonBuckets.of(client, Layout.of(other))
        await theirs.config.put("rules.beta", b"[3]")
        done = await write_configuration(theirs, copy)
        assert (done.written, done.kept) == (["rules.acme", "triage.acme.x"], ["rules.beta"])
        entry = await theirs.query.get("triage.acme.x")
        assert entry is not None
        assert entry.value == b"muted"
        assert await cluster_id(theirs.config) != first
        again = await write_configuration(theirs, copy)
        assert (again.written, again.kept) == ([], ["rules.beta"])


@pytest.mark.parametrize("copy", [b"x", b"[]", b"{}", b'{"format": 2}'])
async def test_other_bytes_are_no_configuration(buckets: CommonBuckets, copy: bytes) -> None:
    with pytest.raises(NoConfiguration):
        await write_configuration(buckets, copy)


async def test_the_progress_of_the_archive(buckets: CommonBuckets) -> None:
    config = buckets.config
    assert await read_progress(config) is None
    await write_progress(config, ArchiveProgress(date(2025, 1, 31), {0: 5, 1: 7}))
    found = await read_progress(config)
    assert found is not None
    assert (found.day, found.next) == (date(2025, 1, 31), {0: 5, 1: 7})
    assert found.until_ns == 1_738_368_000 * 10**9
    with pytest.raises(Conflict):
        await write_progress(config, ArchiveProgress(date(2025, 2, 1), {}))
