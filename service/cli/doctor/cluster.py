"""Checks of the NATS servers and streams of a cluster."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import trio

from betrace.service.cli.doctor.finding import FAILED, NOTE, OK, WARNING, Finding, size
from betrace.service.config.base import split_address
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.settings import Settings
from betrace.service.storage.jetstream import setup
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.layout import Layout
from betrace.service.storage.jetstream.setup import SetupError
from betrace.service.storage.jetstream.survey import (
    ServerState,
    StreamState,
    survey_servers,
    survey_streams,
)

_NAME = "cluster"
LEAST_VERSION = (2, 12, 3)
LEAST_PAYLOAD = 1 << 20
CLOCK_SECONDS = 2.0  # a step of log time is at most that long

_CONNECT_SECONDS = 5.0
_MONITORING_SECONDS = 2.0


def cluster(settings: Settings) -> Iterator[Finding]:
    """The servers, and the streams if a server answers."""
    if settings.cluster is None:
        return
    limit = min(settings.cluster.connect_seconds, _CONNECT_SECONDS)
    wanted = settings.cluster.model_copy(update={"connect_seconds": limit})
    servers = trio.run(survey_servers, wanted)
    for server in servers:
        yield server_finding(server)
    yield from _syncing(wanted, [each for each in servers if not each.error])
    if wanted.replicas == 1:
        yield Finding(
            _NAME,
            NOTE,
            "cluster.replicas = 1: spans are on one server only",
            "use three servers and cluster.replicas = 3, unless this is a test",
        )
    try:
        problems, streams = trio.run(_streams, wanted)
    except ModuleNotFoundError:
        remedy = "pip install 'betrace[cluster]'"
        yield Finding(_NAME, FAILED, "the NATS client is not installed", remedy)
    except NatsUnavailable as error:
        yield Finding(_NAME, FAILED, str(error), "start the servers; correct cluster.servers")
    else:
        for problem in problems:
            found, _, remedy = problem.partition("; ")
            yield Finding(_NAME, FAILED, found, remedy)
        yield from stream_findings(streams)


async def _streams(settings: ClusterSettings) -> tuple[list[str], list[StreamState]]:
    client = await NatsClient.connect(settings, "betrace doctor")
    try:
        problems: list[str] = []
        generations = None
        try:
            generations = await setup.check(client, settings)
        except SetupError as error:
            problems = error.problems
        return problems, await survey_streams(client, Layout.of(settings, generations))
    finally:
        await client.close()


def server_finding(server: ServerState) -> Finding:
    """Version, JetStream and payload of a server."""
    if server.error:
        remedy = "start it, or remove it from cluster.servers"
        return Finding(_NAME, WARNING, f"NATS server {server.address}: {server.error}", remedy)
    text = f"NATS server {server.address} ({server.name}): version {server.version}"
    if _version(server.version) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        remedy = f"upgrade it to {least} or later, which fixes lost messages"
        return Finding(_NAME, FAILED, text, remedy)
    if not server.jetstream:
        remedy = "add jetstream { store_dir: …, sync_interval: always } to its configuration"
        return Finding(_NAME, FAILED, f"{text}, without JetStream", remedy)
    text += f", messages up to {size(server.max_payload)}"
    if server.max_payload < LEAST_PAYLOAD:
        remedy = f"set max_payload to at least {size(LEAST_PAYLOAD)}"
        return Finding(_NAME, FAILED, text, remedy)
    return Finding(_NAME, OK, text)


def _version(text: str) -> tuple[int, ...]:
    parts = text.partition("-")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def _syncing(settings: ClusterSettings, servers: Sequence[ServerState]) -> Iterator[Finding]:
    """Whether servers sync each write to disk, which only their monitoring port tells."""
    remedy = (
        "set jetstream.sync_interval: always; otherwise a power failure of most servers can lose "
        "acknowledged spans"
    )
    for server in servers:
        always = _sync_always(settings, server)
        who = f"NATS server {server.address}"
        if always is None:
            text = f"{who}: whether it syncs every write is unknown; it has no monitoring port"
            yield Finding(_NAME, NOTE, text, remedy)
        elif always:
            yield Finding(_NAME, OK, f"{who} syncs every write")
        else:
            yield Finding(_NAME, WARNING, f"{who} does not sync every write", remedy)


def _sync_always(settings: ClusterSettings, server: ServerState) -> bool | None:
    if not settings.monitoring_port:
        return None
    host, _ = split_address(urlsplit(f"nats://{server.address}").netloc)
    shown = f"[{host}]" if ":" in host else host
    try:
        url = f"http://{shown}:{settings.monitoring_port}/jsz"
        with urllib.request.urlopen(url, timeout=_MONITORING_SECONDS) as page:
            config = json.loads(page.read())["config"]
            return bool(config.get("sync_always", False))
    except (OSError, urllib.error.URLError, ValueError, LookupError, TypeError):
        return None


def stream_findings(streams: Sequence[StreamState]) -> Iterator[Finding]:
    """Leaders, replicas, and the leaders' clocks."""
    present = [each for each in streams if each.exists]
    headless = [each.name for each in present if not each.leader]
    if headless:
        text = f"without leader: {', '.join(headless)}"
        yield Finding(_NAME, FAILED, text, "start the NATS servers that are down")
    behind = [
        each.name for each in present if each.leader and each.replicas < each.config["num_replicas"]
    ]
    if behind:
        text = f"not complete on all of their servers: {', '.join(behind)}"
        yield Finding(_NAME, WARNING, text, "start the NATS servers that are down, or wait")
    if present and not headless and not behind:
        yield Finding(_NAME, OK, f"{len(present)} streams have leaders and all replicas")
    clocks: dict[str, float] = {}
    for each in present:
        off = max(0.0, abs(each.clock_difference) - each.uncertainty)
        if each.leader:
            clocks[each.leader] = max(off, clocks.get(each.leader, 0.0))
    wrong = {name: off for name, off in clocks.items() if off > CLOCK_SECONDS}
    for name, off in sorted(wrong.items()):
        text = f"the clock of NATS server {name} differs by {off:.1f} s from this machine's"
        yield Finding(_NAME, WARNING, text, "synchronise the clocks, for example with chrony")
    if clocks and not wrong:
        yield Finding(_NAME, OK, "the clocks of the NATS servers agree with this machine's")
