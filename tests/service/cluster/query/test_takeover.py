"""Two query nodes on a real NATS server, one of which is killed."""

from __future__ import annotations

from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace

import trio

from betrace.service.app.builder import open_query_service
from betrace.service.app.query import connect_query
from betrace.service.cluster import output
from betrace.service.cluster.partition_map import PartitionMap
from betrace.service.cluster.query.sending import read_sequences
from betrace.service.cluster.query.shared_alerts import PROGRESS
from betrace.service.cluster.tenant_feed import TenantFeed
from betrace.service.otlp.partition import partition_of
from betrace.service.storage.jetstream.bucket import ConfigBucket
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.traces.verdicts import Decided
from tests.service.cluster.query.test_sending import impatient, raised
from tests.support.api_client import ApiClient
from tests.support.http_receiver import receiving
from tests.support.inprocess import served, settings
from tests.support.nats_servers import connected
from tests.support.query_nodes import FedNode, retraction, until

_ = impatient

EXPORT = "export-otlp"
PARTITIONS = range(2)


class Cluster:
    """Query nodes in this process, and an evaluator's output."""

    def __init__(self, given, client, directory, sections):
        self.settings, self.client = given, client
        self._directory, self._sections = directory, sections
        self.layout = Layout.of(given)
        self.shared = ConfigBucket(client, self.layout.query_bucket)
        self.logs = {p: FencedLog(client, self.layout, p) for p in PARTITIONS}
        self.ends = dict.fromkeys(PARTITIONS, 0)

    async def begin(self):
        for partition, log in self.logs.items():
            self.ends[partition] = (await log.open("evaluator")).sequence

    async def decide(self, *signals):
        for each in signals:
            partition = partition_of(each.tenant, bytes.fromhex(each.trace_id), len(PARTITIONS))
            end = self.ends[partition] = self.ends[partition] + 1
            [data] = output.pack(
                output.Output(
                    decided=[Decided(each.tenant, [each], None)],
                    upto=end, step=end, log_time_ns=end, time_ns=1,
                    counts=output.Counts(evaluated=end),
                )
            )  # fmt: skip
            await self.logs[partition].append(data)

    async def running(self, name, ended, task_status=trio.TASK_STATUS_IGNORED):
        """Run a query node until ``ended``; then it dies without saving or releasing anything."""
        client = await NatsClient.connect(self.settings, name)
        config = settings(self._directory / name, rules={}, **self._sections)
        with ExitStack() as stack:
            make = open_query_service(config, stack)
            async with trio.open_nursery() as nursery:
                config_bucket = ConfigBucket(client, self.layout.config_bucket)
                partitions = PartitionMap(config_bucket, self.layout.generations)
                feed = TenantFeed(config_bucket)
                nursery.start_soon(feed.run)
                roles, others = ["query"], FedNode()
                connection = connect_query(
                    self.settings, name, roles, client, partitions, feed, others, "takeover"
                )
                service = make(connection)
                async with served(service, die=True):
                    task_status.started(service)
                    await ended.wait()
                nursery.cancel_scope.cancel()
        await client.close()

    async def sent(self, key):
        """How far a destination is."""
        entry = await self.shared.get(key)
        return None if entry is None else read_sequences(entry.value)


async def eventually(condition):
    with trio.fail_after(60):
        while not await condition():
            await trio.sleep(0.02)


def exported(receiver):
    return sorted(int.from_bytes(record.trace_id, "big") - 1 for record in receiver.records())


class TenantsApi(ApiClient):
    """The API as the tenant acme uses it."""

    async def ask(self, method, path, status=200, body=None, **headers):
        return await super().ask(method, path, status, body, X_Scope_OrgID="acme", **headers)


async def test_a_query_node_is_killed_and_the_other_takes_over(server, tmp_path):
    given = server.settings(prefix="takeover", lease_seconds=0.5, heartbeat_seconds=0.2)
    async with AsyncExitStack() as stack:
        receiver, hook = stack.enter_context(receiving()), stack.enter_context(receiving())
        client = await stack.enter_async_context(connected(given))
        sections = {
            "export": {"otlp": {"endpoint": receiver.url}},
            "alerts": {"webhook": {"url": hook.url, "wait_seconds": 0}},
        }
        cluster = Cluster(given, client, tmp_path, sections)
        await cluster.begin()
        await _kill_one(cluster, receiver, hook)


async def _kill_one(cluster, receiver, hook):
    async with trio.open_nursery() as nursery:
        ends = {name: trio.Event() for name in ("one", "two")}
        nodes = {}
        for name, ended in ends.items():
            nodes[name] = await nursery.start(cluster.running, name, ended)
        for key in (f"sent.{EXPORT}", PROGRESS):
            await eventually(lambda key=key: cluster.sent(key))

        # One of them exports, and both have everything.
        first = raised(1)
        await cluster.decide(first, *map(raised, range(2, 6)))
        await until(lambda: len(receiver.records()) == 5)
        await until(lambda: len(hook.alerts()) == 1)
        for service in nodes.values():
            await until(lambda s=service: s.store.counts("acme").signals == 5)
            await until(lambda s=service: s.alerts.firing("acme"))
        apis = {name: TenantsApi(service) for name, service in nodes.items()}

        # What is written at one holds at the other.
        await apis["one"].ask("PUT", "/api/v1/rules/mine", 201, {"condition": "never { x }"})
        rule = await apis["two"].get("/api/v1/rules/mine", 200) if await _has(nodes["two"]) else {}
        assert rule["condition"] == "never { x }"
        await apis["two"].ask("PUT", "/api/v1/rules/mine/mute", 200, {"for": "1h", "reason": "x"})
        muted = nodes["one"].tools.triage
        await until(lambda: muted.current_mute("acme", "mine"))

        async def everything_is_noted():
            found = await cluster.sent(f"sent.{EXPORT}")
            return found == {str(partition): end for partition, end in cluster.ends.items()}

        await eventually(everything_is_noted)
        holder = next(n for n, s in nodes.items() if s.node.cluster.duties.get(EXPORT).held)
        other = nodes["two" if holder == "one" else "one"]
        subscription = other.subscriptions.open("acme")
        ends[holder].set()  # it dies
        await cluster.decide(*map(raised, range(6, 10)))
        await until(lambda: len(receiver.records()) == 9)
        await until(lambda: other.alerts.book.firing == 1)
        live = [await subscription.receive() for _ in range(4)]
        assert len({each.id for each in live}) == 4
        await until(lambda: other.alerts.firing("acme")[0].count == 9)
        await cluster.decide(*(retraction(replace(raised(n))) for n in range(1, 10)))
        await until(lambda: len(hook.alerts()) == 2)
        await until(lambda: len(receiver.records()) == 18)
        for ended in ends.values():
            ended.set()
    began, resolved = hook.alerts()
    assert (began["status"], resolved["status"]) == ("firing", "resolved")
    assert began["startsAt"] == resolved["startsAt"]
    assert exported(receiver) == sorted([*range(1, 10), *range(1, 10)])


async def _has(service):
    await until(lambda: service.registry.store.rules("acme"))
    return True
