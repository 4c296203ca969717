"""``betrace demo``: the service on a temporary directory, and a sample shop that sends to it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
import trio

from betrace.service.cli.common import (
    FOUND,
    URL,
    Failure,
    json_option,
    print_json,
    printable,
)
from betrace.service.cli.demo.shop_process import (
    ANY_PORT,
    IDLE_SECONDS,
    Customer,
    copy_rules,
    free_address,
    run_shop,
)
from betrace.service.cli.serve import run_service
from betrace.service.config.base import OFF
from betrace.service.config.load import load
from betrace.service.telemetry.logs import set_up_logging

if TYPE_CHECKING:
    from betrace.service.app.service import Addresses

ONCE_SECONDS = 30.0  # for all of --once except the start of the service
_POLL_SECONDS = 0.2
_SETTLE_SECONDS = 0.5  # time for an unexpected signal to arrive
_COLOURS = {"critical": "red", "high": "yellow", "medium": "cyan"}

Json = dict[str, Any]


@click.command()
@click.option("--once", is_flag=True, help="Send every kind of trace once, check, and exit.")
@click.option(
    "--cluster",
    is_flag=True,
    help="A whole cluster on this machine, whose processes are killed while the shop sends. Needs "
    "nats-server.",
)
@click.option(
    "--ingest",
    metavar="HOST:PORT",
    help="Where to receive spans; by default 127.0.0.1:4318, or any port if that is taken.",
)
@click.option(
    "--api",
    metavar="HOST:PORT",
    help="Where the API listens; by default 127.0.0.1:8090, or any port if that is taken.",
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    default="off",
    help="A listener for metrics alone; by default, only the API serves them.",
)
@json_option
def demo(
    once: bool,
    cluster: bool,
    ingest: str | None,
    api: str | None,
    metrics: str,
    as_json: bool,
) -> None:
    """See it work: the service on a temporary directory, and a sample shop that sends to it.

    The shop is instrumented with the OpenTelemetry SDK, and some of what it does breaks the
    sample rules. Signals are printed as they are stored. With --once every kind of trace is sent
    once, on any free ports, and the signals are compared with the expected ones: exit code 1 if
    one is missing or unexpected.

    With --cluster, three NATS servers, two edges, three evaluators and two query nodes run on this
    machine. An evaluator, an edge, the leader of a stream and a query node are killed and started
    again, and at the end a table shows which signals were due and found. Without --once this
    repeats until Ctrl-C.

    \b
    Examples:
      betrace demo
      betrace demo --once --json
      betrace demo --cluster --once
    """
    import betrace.service.cli.demo.shop  # noqa: F401  # fails here without the extra `demo`

    if cluster:
        from betrace.service.cli.demo.cluster import run_cluster_demo

        given = {"--ingest": ingest, "--metrics": None if metrics == OFF else metrics}
        for option, value in given.items():
            if value is not None:
                raise Failure(f"{option} does not work with --cluster; leave it out")
        sys.exit(run_cluster_demo(api, once=once, as_json=as_json))
    addresses = {
        "ingest.address": ingest or (ANY_PORT if once else free_address("127.0.0.1:4318")),
        "ingest.grpc_address": ANY_PORT if once else free_address("127.0.0.1:4317"),
        "api.address": api or (ANY_PORT if once else free_address(URL.removeprefix("http://"))),
        "metrics.address": metrics,
    }
    with tempfile.TemporaryDirectory(prefix="betrace-demo-") as directory:
        settings = load(
            None,
            addresses
            | {
                "storage.path": f"{directory}/data",
                "rules.directory": str(copy_rules(Path(directory, "rules"))),
                "traces.idle_seconds": IDLE_SECONDS,
                "logging.level": "warning",
                "tls.certificate": "",
                "tls.key": "",
            },
        )
        set_up_logging(settings.logging)
        shown = _Demo(once=once, as_json=as_json)
        shown.say("starting the service on a temporary directory")
        run_service(settings, shown.run, shown.say)
    sys.exit(shown.code())


class _Demo:
    def __init__(self, *, once: bool, as_json: bool) -> None:
        self._once = once
        self._as_json = as_json
        self._customers: dict[str, Customer] = {}
        self._checked = False
        self._addresses: Addresses

    def say(self, text: str) -> None:
        """Print progress; with --json, on standard error."""
        click.echo(text, err=self._as_json)

    def code(self) -> int:
        """The exit code."""
        if not self._once:
            return 0
        if not self._checked:
            raise Failure("stopped before everything was checked; run it again")
        return 0 if all(customer.ok for customer in self._customers.values()) else FOUND

    async def run(self, addresses: Addresses) -> None:
        """Runs with the service."""
        self._addresses = addresses
        if addresses.ingest is None or addresses.api is None:
            raise Failure("the demo needs both listeners; omit --ingest off and --api off")
        self.say(f"receiving spans at {addresses.ingest}, API at {addresses.api}")
        async with (
            httpx.AsyncClient(base_url=addresses.api, trust_env=False, timeout=10) as client,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(self._print_signals, client)
            if self._once:
                await self._check_once(client)
                nursery.cancel_scope.cancel()
            else:
                self._say_where_to_look()
                await self._run_shop()
                raise Failure("the sample shop has ended; its output above says why")

    # The shop

    async def _run_shop(self, *options: str) -> None:
        """Run the shop to its end, and record its customers."""
        from betrace.service.cli.demo.shop import SCENARIOS

        assert self._addresses.ingest is not None

        def record(trace_id: str, scenario: str) -> None:
            self._customers[trace_id] = Customer(trace_id, scenario, SCENARIOS[scenario][1])

        await run_shop(self._addresses.ingest, record, *options)

    # Signals

    async def _print_signals(
        self,
        client: httpx.AsyncClient,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Print each signal once it is stored."""
        async with client.stream("GET", "/api/v1/signals/stream", timeout=None) as response:
            task_status.started()
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    self._print_signal(json.loads(line.removeprefix("data:")))

    def _print_signal(self, signal: Json) -> None:
        if self._as_json:
            if not self._once:
                print_json(signal)
            return
        severity = signal["severity"]
        label = click.style(f"{severity:8}", fg=_COLOURS.get(severity), bold=True)
        retracted = "retracted: " if signal["kind"] == "retracted" else ""
        click.echo(f"{label} {signal['rule_id']}  trace {signal['trace_id']}")
        click.echo(f"         {retracted}{printable(signal['message'])}")

    def _say_where_to_look(self) -> None:
        api, metrics = self._addresses.api, self._addresses.metrics
        self.say("")
        self.say("where to look next:")
        self.say(f"  pages     {api}/")
        self.say(f"  the TUI   betrace tui{'' if api == URL else f' --url {api}'}")
        self.say(f"  signals   curl -s '{api}/api/v1/signals?severity=critical&limit=5'")
        self.say(f"  a trace   curl -s {api}/api/v1/traces/<trace id>")
        self.say(f"  rules     curl -s {api}/api/v1/rules")
        self.say(f"  the API   {api}/docs")
        self.say(f"  metrics   curl -s {metrics or api}/metrics")
        self.say(f"  send your own: OTEL_EXPORTER_OTLP_ENDPOINT={self._addresses.ingest}")
        self.say("Ctrl-C ends the demo and deletes its data")
        self.say("")

    # --once

    async def _check_once(self, client: httpx.AsyncClient) -> None:
        with trio.move_on_after(ONCE_SECONDS):
            await self._run_shop("--once")
            await self._wait_until_closed(client)
            await self._wait_for_expected(client)
            await trio.sleep(_SETTLE_SECONDS)
            await self._read_signals(client)
            self._checked = True
        if not self._checked:
            self.say(f"some expected signals were missing after {ONCE_SECONDS:g} s")
            await self._read_signals(client)
            self._checked = bool(self._customers)
        self._report()

    async def _wait_until_closed(self, client: httpx.AsyncClient) -> None:
        """Wait until every trace is decided, which is when it is in the index."""
        while True:
            listed = await _get(client, "/api/v1/traces?limit=1000")
            if self._customers.keys() <= {trace["trace_id"] for trace in listed["traces"]}:
                return
            await trio.sleep(_POLL_SECONDS)

    async def _wait_for_expected(self, client: httpx.AsyncClient) -> None:
        while True:
            await self._read_signals(client)
            if all(c.expected <= c.found for c in self._customers.values()):
                return
            await trio.sleep(_POLL_SECONDS)

    async def _read_signals(self, client: httpx.AsyncClient) -> None:
        """Record the active signals of each trace, and of traces that nobody sent."""
        listed = await _get(client, "/api/v1/signals?status=active&limit=1000")
        for customer in self._customers.values():
            customer.found.clear()
        for signal in listed["signals"]:
            trace_id = signal["trace_id"]
            customer = self._customers.setdefault(
                trace_id, Customer(trace_id, "was never a customer", frozenset())
            )
            customer.found.add(signal["rule_id"])

    def _report(self) -> None:
        customers = list(self._customers.values())
        expected = sum(len(c.expected) for c in customers)
        met = sum(len(c.expected & c.found) for c in customers)
        unexpected = sum(len(c.found - c.expected) for c in customers)
        ok = bool(customers) and all(c.ok for c in customers)
        if self._as_json:
            report = {
                "ok": ok,
                "expected": expected,
                "found": met,
                "unexpected": unexpected,
                "traces": [c.to_json() for c in customers],
            }
            print_json(report, indent=2)
            return
        click.echo()
        click.echo(f"    {'a customer …':44} {'expected':32} found")
        for customer in customers:
            mark = click.style("ok  ", fg="green") if customer.ok else click.style("BAD ", fg="red")
            rows = max(len(customer.expected), len(customer.found), 1)
            wanted, found = (
                [*sorted(rules), *([""] * (rows - len(rules)))] or ["-"]
                for rules in (customer.expected, customer.found)
            )
            for row in range(rows):
                name = customer.scenario if row == 0 else ""
                click.echo(
                    f"{mark if row == 0 else '    '}{name:44} {wanted[row] or '-':32} "
                    f"{found[row] or '-'}"
                )
        click.echo()
        extra = f", and {unexpected} unexpected" if unexpected else ""
        click.echo(
            f"{len(customers)} traces, {met} of {expected} expected signals found{extra}: "
            + ("all as expected" if ok else "this is wrong")
        )


async def _get(client: httpx.AsyncClient, path: str) -> Json:
    response = await client.get(path)
    if response.status_code != 200:
        raise Failure(
            f"the service answered GET {path} with {response.status_code}: "
            f"{response.text[:500].strip()}; see its log above"
        )
    body: Json = response.json()
    return body
