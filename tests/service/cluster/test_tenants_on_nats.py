"""Tenants of a cluster on a real NATS server: two edges, an evaluator and a query node."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from betrace.service.api.audit import Operator
from betrace.service.app.roles import Role
from betrace.service.cluster.edge import group_commit
from betrace.service.tenancy.tokens import key_id, public_pem
from tests.cluster.links import Link
from tests.support.api_client import ApiClient
from tests.support.clustered import node_settings, process
from tests.support.edges import post
from tests.support.inprocess import write_rules
from tests.support.nats_servers import connected
from tests.support.spans import S, body
from tests.support.tenant_keys import OPERATOR, bearer, new_key, raw

WHO = Operator("test", "")
WAIT = 120
_numbers = itertools.count(1)


@pytest.fixture
def http():
    with httpx.Client(trust_env=False) as found:
        yield found


class TenantCluster:
    """A query node that is an evaluator and an edge as well, and another edge."""

    def __init__(self, whole, edge, urls, http):
        self.service = whole.query
        self.edge = edge
        self.admin = self.service.tools.tenants
        self.api = ApiClient(self.service)
        self.urls = urls
        self.http = http

    async def send(self, key, tenant="acme", edge=1):
        """Send a trace that breaks the rule; its id, and the status."""
        trace = next(_numbers).to_bytes(8, "big") * 2
        sent = body(S(1, trace=trace), S(2, trace=trace))
        headers = {} if key is None else {"authorization": bearer(key, tenant)}
        answer = await post(self.http, self.urls[edge], sent, tenant, **headers)
        return trace.hex(), answer.status_code

    async def until_status(self, status, key, tenant="acme", edge=1):
        """Send until the status is this one; the id of the trace."""
        with trio.fail_after(WAIT):
            while True:
                trace, found = await self.send(key, tenant, edge)
                if found == status:
                    return trace
                await trio.sleep(0.02)

    async def until_traces(self, *traces, tenant="acme"):
        """Wait until these traces have signals."""
        with trio.fail_after(WAIT):
            while not self.traces(tenant) >= set(traces):
                await trio.sleep(0.02)

    def traces(self, tenant="acme"):
        signals, _ = self.service.store.signals(tenant)
        return {each.signal.trace_id for each in signals}


@asynccontextmanager
async def running(server, directory, http, servers=None, **sections):
    cluster = server.settings(prefix=f"tenants{next(_numbers)}", lease_seconds=1)
    write_rules(directory / "whole", {"many": "count(a) > 1"}, "acme")
    whole = node_settings(directory, cluster, "whole", **sections)
    at = cluster.model_copy(update={"servers": servers}) if servers else cluster
    edge = node_settings(directory, at, "edge", **sections)
    async with (
        connected(cluster),
        process(whole, Role.EDGE, Role.EVALUATOR, Role.QUERY) as (one, first),
        process(edge, Role.EDGE) as (two, second),
    ):
        urls = [f"{each.ingest}/v1/traces" for each in (first, second)]
        yield TenantCluster(one, two, urls, http)


AUTH = {"enabled": True, "operator_token": OPERATOR}


async def test_a_tenants_life(server, tmp_path, http):
    key, other = new_key(), new_key()
    async with running(server, tmp_path, http, auth=AUTH) as cluster:
        assert (await cluster.send(key))[1] == 401
        await cluster.admin.create(WHO, "acme", None, public_pem(key))
        first = await cluster.until_status(200, key)
        await cluster.until_traces(first)

        await cluster.admin.add_key(WHO, "acme", public_pem(other), 3600)
        await cluster.admin.revoke_key(WHO, "acme", key_id(raw(key)))
        await cluster.until_status(401, key)
        second = await cluster.until_status(200, other)
        await cluster.until_traces(first, second)

        open_trace = next(_numbers).to_bytes(8, "big") * 2  # is open when acme is deleted
        headers = {"authorization": bearer(other, "acme")}
        sent = body(S(1, trace=open_trace))
        assert (await post(http, cluster.urls[0], sent, "acme", **headers)).status_code == 200
        assert await cluster.admin.delete(WHO, "acme", WAIT)
        assert cluster.service.store.tenants() == []
        await cluster.until_status(401, other)
        assert (await cluster.send(other, edge=0))[1] == 401

        await cluster.admin.create(WHO, "acme", None, public_pem(key))
        rule = {"condition": "count(a) > 1"}
        await cluster.api.ask(
            "PUT",
            "/api/v1/rules/many",
            201,
            rule,
            Authorization=f"Bearer {OPERATOR}",
            X_Scope_OrgID="acme",
        )
        with trio.fail_after(WAIT):  # the first traces may have begun under no rules
            while True:
                third = await cluster.until_status(200, key)
                await trio.sleep(0.3)
                if third in cluster.traces():
                    break
        assert not cluster.traces() & {first, second, open_trace.hex()}
        trace = await cluster.api.get(
            f"/api/v1/traces/{third}",
            Authorization=f"Bearer {OPERATOR}",
            X_Scope_OrgID="acme",
        )
        assert trace["resourceSpans"]  # they are read under the tenant's present name


async def test_ingestion_is_paused_at_all_edges(server, tmp_path, http):
    async with running(server, tmp_path, http) as cluster:
        trace = await cluster.until_status(200, None)
        drained = await cluster.api.post("/api/admin/pipeline/drain?wait=60")
        assert (drained["ingestion"], drained["drained"]) == ("paused", True)
        await cluster.until_traces(trace)
        for edge in (0, 1):
            assert (await cluster.send(None, edge=edge))[1] == 503
        assert (await cluster.api.post("/api/admin/pipeline/resume"))["ingestion"] == "open"
        for edge in (0, 1):
            await cluster.until_status(200, None, edge=edge)


async def test_an_edge_is_cut_off_while_tenants_change(server, tmp_path, http, monkeypatch):
    monkeypatch.setattr(group_commit, "APPEND_SECONDS", 1.0)
    key = new_key()
    link = Link((server.servers[0].host, server.servers[0].port))
    at = f"nats://127.0.0.1:{link.port}"
    try:
        async with running(server, tmp_path, http, at, auth=AUTH) as cluster:
            await cluster.admin.create(WHO, "acme", 1000, public_pem(key))
            await cluster.until_status(200, key)
            link.cut()
            await cluster.admin.delete(WHO, "acme", WAIT)
            assert (await cluster.send(key))[1] == 503  # it does not know, and stores nothing
            link.heal()
            await cluster.until_status(401, key)
            assert cluster.service.store.tenants() == []
    finally:
        link.close()
