"""Divides tenants' quotas between edges by demand.

Each edge says once a second how many spans per second each tenant sends it, and admits the same
fraction of the tenant's quota as its fraction of the demand. An edge without demand of a tenant
has 5 % of the quota divided by the number of edges, so that the first spans are not refused. All
edges together therefore admit at most 105 % of a quota, besides what the buckets of edges without
demand have saved: another 5 % within ten seconds.

Reports are plain messages: a lost one only makes fractions a second older. Without any connection
the last fractions stay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson
import trio

from betrace.channels import TransientError
from betrace.service.cluster.requests import subscribed
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.tenancy.quotas import SpanQuotas

if TYPE_CHECKING:
    from nats.aio.msg import Msg

_log = logging.getLogger("service.edge")

REPORT_SECONDS = 1.0
FORGET_SECONDS = 3.5
"""An edge that has not reported for this long is gone."""
HELLO_SECONDS = 0.25  # how long a new edge waits for the reports of the others
DIVIDE_SECONDS = 0.1  # after a report; a rising demand elsewhere lowers this edge's part
RESERVE = 0.05
"""Fraction of a quota for edges without demand."""
FIRST_PART = 0.1  # until the others are known
_SMOOTHING = 0.3  # weight of the last second; exporters send every few seconds
_LEAST = 0.5  # spans per second that count as demand
_MOST_TENANTS = 5000  # in a report: those with the most spans


@dataclass(slots=True)
class _Report:
    at: float
    demand: Mapping[str, float] = field(default_factory=dict)


class DemandShares:
    """Computes an edge's parts of the quotas. ``name`` is the edge's, and unique."""

    def __init__(self, quotas: SpanQuotas, name: str) -> None:
        self._quotas = quotas
        self._name = name
        self._own: dict[str, float] = {}
        self._reports: dict[str, _Report] = {}
        self.changed = False
        """Whether there are reports that :meth:`divide` has not seen."""
        quotas.divide({}, FIRST_PART)

    @property
    def edges(self) -> int:
        """How many edges share the quotas, with this one."""
        return 1 + len(self._reports)

    def measure(self, seconds: float) -> None:
        """Take note of the demand of the last ``seconds``."""
        asked = self._quotas.take_demand()
        own = {}
        for tenant in {*self._own, *asked}:
            before = self._own.get(tenant, 0.0)
            now = asked.get(tenant, 0) / seconds
            smooth = now if not before else before + _SMOOTHING * (now - before)
            if smooth >= _LEAST:
                own[tenant] = smooth
        self._own = own

    def report(self, hello: bool = False) -> bytes:
        """What the other edges are told; ``hello`` asks for their reports."""
        largest = sorted(self._own.items(), key=lambda each: -each[1])[:_MOST_TENANTS]
        demand = {tenant: round(spans, 1) for tenant, spans in largest}
        return orjson.dumps({"edge": self._name, "hello": hello, "demand": demand})

    def receive(self, data: bytes, now: float) -> bool:
        """Take the report of an edge; returns whether it asks for this one's."""
        try:
            report = orjson.loads(data)
            edge, demand = str(report["edge"]), dict(report["demand"])
            hello = bool(report["hello"])
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("a report about quotas cannot be read: %s", error)
            return False
        if edge == self._name:
            return False
        self._reports[edge] = _Report(now, demand)
        self.changed = True
        return hello

    def divide(self, now: float) -> None:
        """Set this edge's parts of the quotas."""
        self.changed = False
        for edge, report in list(self._reports.items()):
            if now - report.at > FORGET_SECONDS:
                del self._reports[edge]
        edges = self.edges
        total: dict[str, float] = dict(self._own)
        for report in self._reports.values():
            for tenant, spans in report.demand.items():
                total[tenant] = total.get(tenant, 0.0) + spans
        least = RESERVE / edges
        parts = {
            tenant: max(least, self._own.get(tenant, 0.0) / spans)
            for tenant, spans in total.items()
            if spans > 0
        }
        self._quotas.divide(parts, 1 / edges)


class QuotaExchange:
    """Sends and receives the reports of edges."""

    def __init__(self, shares: DemandShares, client: NatsClient, subject: str) -> None:
        self._shares = shares
        self._client = client
        self._subject = subject

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange reports until cancelled. Starts when the other edges are known, or do not
        answer."""
        send, receive = trio.open_memory_channel[bytes](1000)
        token = trio.lowlevel.current_trio_token()

        def deliver(data: bytes) -> None:
            try:
                send.send_nowait(data)
            except (trio.WouldBlock, trio.BrokenResourceError):
                _log.debug("a report about quotas was dropped")

        async def received(message: Msg) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(deliver, message.data)

        async with subscribed(self._client, self._subject, received), trio.open_nursery() as tasks:
            tasks.start_soon(self._receive, receive)
            await self._publish(hello=True)
            await trio.sleep(HELLO_SECONDS)
            self._shares.divide(trio.current_time())
            task_status.started()
            await self._report()

    async def _receive(self, receive: trio.MemoryReceiveChannel[bytes]) -> None:
        async for data in receive:
            if self._shares.receive(data, trio.current_time()):
                await self._publish()

    async def _report(self) -> None:
        shares = self._shares
        last = trio.current_time()
        while True:
            await trio.sleep(DIVIDE_SECONDS)
            now = trio.current_time()
            if due := now - last >= REPORT_SECONDS:
                shares.measure(now - last)
                last = now
                await self._publish()
            if (due or shares.changed) and self._client.connected:  # otherwise the parts stay
                shares.divide(now)

    async def _publish(self, hello: bool = False) -> None:
        data = self._shares.report(hello)
        try:
            await self._client.call(lambda nats: nats.nc.publish(self._subject, data), 1.0)
        except TransientError as error:
            _log.debug("a report about quotas was not sent: %s", error)
        except Exception as error:  # of nats-py: the connection is lost
            _log.debug("a report about quotas was not sent: %r", error)
