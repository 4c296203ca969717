"""The tenants at an edge, with a bucket in memory."""

from __future__ import annotations

import sqlite3
import time
from contextlib import asynccontextmanager

import pytest
import trio

from betrace.channels import ThreadRunner
from betrace.service.cluster.edge import tenants as edge_tenants
from betrace.service.cluster.edge.tenants import IngestTenants, TenantCopy
from betrace.service.cluster.tenant_entries import (
    INGESTION_KEY,
    pack_ingestion,
    pack_tenant,
    tenant_key,
    unpack_tenant,
)
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.config.settings import Settings
from betrace.service.tenancy.authentication import Denied, OperatorTokens
from betrace.service.tenancy.directory import TenantDirectory
from betrace.service.tenancy.gate import Gate
from betrace.service.tenancy.tenant import PublicKey, Tenant, TenantState
from betrace.service.tenancy.tokens import key_id
from tests.support.query_nodes import MemoryBucket
from tests.support.tenant_keys import OPERATOR, bearer, new_key, raw

KEY = new_key()


def acme(*keys, quota=None, generation=0, state=TenantState.ACTIVE):
    public = tuple(PublicKey(key_id(raw(key)), raw(key), 1, None) for key in keys)
    return Tenant("acme", state, 1, quota, public, generation)


class EdgeWorld:
    """An edge's gate in front of a bucket."""

    def __init__(self, directory, bucket, settings, tokens):
        async def exists(name):
            return True

        self.bucket = bucket
        self.directory = TenantDirectory(directory / "tenants.sqlite")
        self.gate = Gate(settings, self.directory, tokens, exists)
        self.feed = TenantFeed(bucket)
        self.threads = ThreadRunner("copy", 1)
        self.ingest = IngestTenants(self.gate, self.feed)

    async def put(self, tenant):
        return await self.bucket.put(tenant_key(tenant.name), pack_tenant(tenant))

    async def until(self, condition):
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.01)

    async def accepts(self, key, tenant="acme"):
        found = await self.gate.authenticator.tenant(bearer(key, tenant))
        assert isinstance(found, Denied) or found == tenant
        return found == tenant


@pytest.fixture
def bucket():
    return MemoryBucket()


@pytest.fixture
def running(tmp_path, bucket):
    @asynccontextmanager
    async def run(auth=True, synced=True, **ingest):
        settings = Settings(ingest=ingest, auth={"enabled": auth, "operator_token": OPERATOR})
        edge = EdgeWorld(tmp_path, bucket, settings, OperatorTokens(OPERATOR) if auth else None)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(edge.feed.run)
                await nursery.start(TenantCopy(edge.gate, edge.feed, edge.threads).run)
                nursery.start_soon(edge.ingest.run)
                yield edge
                nursery.cancel_scope.cancel()
        finally:
            edge.threads.close()
            edge.gate.close()
            edge.directory.close()

    return run


async def test_keys_and_quotas_of_the_bucket_are_used_at_once(running, bucket):
    other = new_key()
    await bucket.put(tenant_key("acme"), pack_tenant(acme(KEY, quota=7)))
    async with running() as edge:
        assert edge.gate.quotas.rate("acme") == 7
        assert await edge.accepts(KEY)
        await edge.put(acme(other, quota=9))
        await edge.until(lambda: edge.gate.revisions["acme"] == 2)
        assert edge.gate.quotas.rate("acme") == 9
        assert await edge.accepts(other)
        assert not await edge.accepts(KEY)  # although it was verified before


async def test_an_edge_without_the_bucket_knows_what_it_knew(running, bucket, monkeypatch):
    monkeypatch.setattr(edge_tenants, "SYNC_SECONDS", 0.05)
    async with running() as edge:
        await edge.put(acme(KEY, quota=7))
        await edge.until(lambda: edge.gate.quotas.rate("acme") == 7)
    bucket.unavailable = True
    async with running() as edge:
        assert edge.gate.quotas.rate("acme") == 7
        assert await edge.accepts(KEY)
        bucket.unavailable = False
        revision = await edge.put(acme(state=TenantState.DELETED))
        await edge.until(lambda: edge.gate.revisions["acme"] == revision)
        assert "acme" in edge.gate.closed
        assert edge.directory.get("acme") is None
        assert not await edge.accepts(KEY)


async def test_what_an_earlier_revision_says_is_ignored(running, bucket):
    async with running() as edge:
        stale = await edge.put(acme(KEY))
        await edge.put(acme())
        await edge.until(lambda: edge.gate.revisions.get("acme", 0) > stale)
    entry = bucket.latest[tenant_key("acme")]
    behind = entry.__class__(entry.key, pack_tenant(acme(KEY)), stale)
    bucket.latest[tenant_key("acme")] = behind  # as a replica that is behind has it
    async with running() as edge:
        assert not await edge.accepts(KEY)


async def test_a_deleted_tenant_is_refused_and_its_successor_has_another_name(running):
    async with running() as edge:
        await edge.put(acme(KEY))
        await edge.until(lambda: edge.gate.revisions)
        received_ns = time.time_ns()
        assert edge.ingest.refusal("acme", received_ns) is None
        assert edge.ingest.log_name("acme") == "acme"
        generation = await edge.put(acme(state=TenantState.DELETED))
        await edge.until(lambda: edge.ingest.was_deleted("acme"))
        assert edge.ingest.refusal("acme", time.time_ns()).status == 403
        await edge.put(acme(KEY, generation=generation))
        await edge.until(lambda: "acme" not in edge.gate.closed)
        assert edge.ingest.log_name("acme") == f"acme={generation}"
        assert edge.ingest.refusal("acme", received_ns).status == 403  # from before
        assert edge.ingest.refusal("acme", time.time_ns()) is None


async def test_a_deletion_that_an_edge_missed(running):
    async with running() as edge:
        await edge.put(acme(KEY))
        await edge.until(lambda: edge.gate.revisions)
    await edge.put(acme(state=TenantState.DELETED))
    await edge.put(acme(KEY, generation=2))
    async with running() as edge:
        await edge.until(lambda: edge.ingest.log_name("acme") == "acme=2")
        assert await edge.accepts(KEY)


async def test_a_change_that_cannot_be_stored_is_tried_again(running, monkeypatch):
    monkeypatch.setattr(edge_tenants, "RETRY_SECONDS", 0.01)
    async with running() as edge:
        write, failures = edge.directory.write, iter(range(3))

        def fail(tenants):
            if next(failures, None) is not None:
                with edge.directory._errors():
                    raise sqlite3.OperationalError("disk full")
            write(tenants)

        monkeypatch.setattr(edge.directory, "write", fail)
        await edge.put(acme(KEY))
        await edge.until(lambda: edge.gate.revisions)
        assert await edge.accepts(KEY)


async def test_without_authentication_edges_share_the_limit_of_tenants(running, bucket):
    async with running(auth=False, max_tenants=2) as edge:
        limit = edge.gate.tenant_limit
        assert limit.refusal("one") is None
        edge.ingest.log_name("one")
        await edge.until(lambda: edge.gate.implicit == {"one"})
        assert unpack_tenant(bucket.latest[tenant_key("one")]).state is TenantState.IMPLICIT
        other = Tenant("two", TenantState.IMPLICIT, 1, None)  # from another edge
        await edge.put(other)
        await edge.until(lambda: edge.gate.implicit == {"one", "two"})
        assert limit.refusal("three").status == 403
        assert limit.refusal("two") is None
        await edge.put(Tenant("two", TenantState.DELETED, 1, None))
        await edge.until(lambda: "two" in edge.gate.closed)
        await edge.until(lambda: limit.refusal("three") is None)


async def test_a_new_tenant_becomes_known_once_there_is_a_quorum(running, bucket, monkeypatch):
    monkeypatch.setattr(edge_tenants, "RETRY_SECONDS", 0.01)
    async with running(auth=False) as edge:
        bucket.unavailable = True
        edge.ingest.log_name("one")
        await trio.sleep(0.05)
        assert tenant_key("one") not in bucket.latest
        bucket.unavailable = False
        await edge.until(lambda: tenant_key("one") in bucket.latest)


async def test_an_edge_learns_that_ingestion_is_paused(running, bucket):
    seen = []
    async with running() as edge:
        edge.feed.subscribe_paused(seen.append)
        await bucket.put(INGESTION_KEY, pack_ingestion(True))
        await edge.until(lambda: seen[-1])
        await bucket.put(INGESTION_KEY, b"junk")  # keeps what is known
        revision = await bucket.put(INGESTION_KEY, pack_ingestion(False))
        await edge.until(lambda: not seen[-1])
        assert edge.feed.ingestion_revision == revision
    assert seen == [False, True, False]
