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
from betrace.service.storage.jetstream.bucket import ConfigBucket, Conflict
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.configuration import (
    NoConfiguration,
    cluster_id,
    read_configuration,
    write_configuration,
)
from betrace.service.storage.jetstream.layout import Layout
from tests.support.nats_servers import NatsServers, connected


@pytest.fixture
def config(client: NatsClient, settings: ClusterSettings) -> ConfigBucket:
    return ConfigBucket(client, Layout.of(settings).config_bucket)


async def test_a_new_cluster_gets_what_the_old_one_had(
    config: ConfigBucket, settings: ClusterSettings, one_server: NatsServers
) -> None:
    first = await cluster_id(config)
    assert await cluster_id(config) == first
    for key, value in (("rules.acme", b"[1]"), ("rules.beta", b"[2]"), ("gone", b"x")):
        await config.put(key, value)
    await config.delete("gone")
    copy = await read_configuration(config)
    assert (await write_configuration(config, copy)).same_cluster
    other = one_server.settings(prefix=f"{settings.prefix}b")
    async with connected(other) as client:
        theirs = ConfigBucket(client, Layout.of(other).config_bucket)
        await theirs.put("rules.beta", b"[3]")
        done = await write_configuration(theirs, copy)
        assert (done.written, done.kept) == (["rules.acme"], ["rules.beta"])
        entry = await theirs.get("rules.acme")
        assert entry is not None
        assert entry.value == b"[1]"
        assert await cluster_id(theirs) != first
        again = await write_configuration(theirs, copy)
        assert (again.written, again.kept) == ([], ["rules.beta"])


@pytest.mark.parametrize("copy", [b"x", b"[]", b"{}", b'{"format": 2}'])
async def test_other_bytes_are_no_configuration(config: ConfigBucket, copy: bytes) -> None:
    with pytest.raises(NoConfiguration):
        await write_configuration(config, copy)


async def test_the_progress_of_the_archive(config: ConfigBucket) -> None:
    assert await read_progress(config) is None
    await write_progress(config, ArchiveProgress(date(2025, 1, 31), {0: 5, 1: 7}))
    found = await read_progress(config)
    assert found is not None
    assert (found.day, found.next) == (date(2025, 1, 31), {0: 5, 1: 7})
    assert found.until_ns == 1_738_368_000 * 10**9
    with pytest.raises(Conflict):
        await write_progress(config, ArchiveProgress(date(2025, 2, 1), {}))
