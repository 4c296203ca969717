"""Times at three replicas under a small load: from a span to its signal, and the pauses after
failures and moves. They depend on how busy the machine is."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import trio

from betrace.service.cluster import output as messages
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.errors import NatsUnavailable
from betrace.service.storage.jetstream.fenced import FencedLog
from betrace.service.storage.jetstream.layout import Layout
from perf.bench import probe
from perf.cluster.nodes import WholeCluster, by_partition, samples, whole_cluster
from perf.lib.quantiles import value_at
from perf.lib.target import GeneratorProcess
from perf.report import output

KINDS = ("signal", "evaluator", "move", "leader")
RATE = 3000  # spans/s besides the probes; each trace breaks a rule, so that OUT is written often
MOST_SECONDS = 60.0

Json = dict[str, Any]


@dataclass(slots=True)
class Watched:
    """What the outputs of all partitions had, as it was stored."""

    signals: dict[str, float] = field(default_factory=dict)
    """When a trace's first signal was read, on the monotonic clock."""
    stored: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By partition, the servers' time of each message and its epoch."""


async def _follow(log: FencedLog, partition: int, found: Watched) -> None:
    after, epoch = await log.last(), 0
    stored = found.stored.setdefault(partition, [])
    while True:
        try:
            some = await log.read(after, None, 1 << 20, 5.0)
        except NatsUnavailable:  # the leader was killed
            await trio.sleep(0.1)
            continue
        for message in some:
            now, after = time.monotonic(), message.sequence
            if message.epoch:
                epoch = message.epoch
                continue
            stored.append((message.time_ns, epoch))
            for decided in messages.unpack(message.data).decided:
                for signal in decided.signals:
                    found.signals.setdefault(signal.trace_id, now)


@contextmanager
def _load(cluster: WholeCluster) -> Iterator[None]:
    generator = GeneratorProcess(
        [
            f"--url={cluster.edges[0].ingest}/v1/traces",
            "--spans=100",
            f"--rate={RATE}",
            "--secs=3600",
            "--breaches=1",
            "--honour-retry-after",
        ]
    )
    try:
        generator.start()
        generator.wait_begin()
        yield
    finally:
        generator.stop()


# Kinds


async def _signals(cluster: WholeCluster, found: Watched, number: int) -> list[float]:
    """Seconds from sending a span that breaks a rule until its signal is read from the log."""
    seconds: list[float] = []
    async with httpx.AsyncClient(trust_env=False, timeout=MOST_SECONDS) as client:
        for each in range(number):
            trace = os.urandom(16)
            began = time.monotonic()
            await _send(client, cluster, trace)
            with trio.fail_after(MOST_SECONDS):
                while trace.hex() not in found.signals:
                    await trio.sleep(0.002)
            seconds.append(found.signals[trace.hex()] - began)
            await trio.sleep(0.05 + 0.01 * (each % 7))  # not in step with the batches
    return seconds


async def _send(client: httpx.AsyncClient, cluster: WholeCluster, trace: bytes) -> int:
    url, kind = f"{cluster.edges[0].ingest}/v1/traces", {"Content-Type": "application/x-protobuf"}
    return (await client.post(url, content=probe(trace), headers=kind)).status_code


async def _kill_evaluator(cluster: WholeCluster, number: int) -> float:
    """Seconds from the kill until others are current with all partitions; then a new one joins."""
    victim = cluster.evaluators.pop(0)
    victim.kill()
    began = time.monotonic()
    with trio.fail_after(MOST_SECONDS):
        while await trio.to_thread.run_sync(_current, cluster) < cluster.settings.partitions:
            await trio.sleep(0.05)
    seconds = time.monotonic() - began
    await _join(cluster, f"after-kill-{number}")
    return seconds


def _current(cluster: WholeCluster) -> float:
    found = (samples(node) for node in cluster.evaluators)
    return sum(sum(by_partition(each, "betrace_partition_current").values()) for each in found)


async def _join(cluster: WholeCluster, name: str) -> None:
    """One more evaluator, until it has its share."""
    node = await trio.to_thread.run_sync(cluster.join, name)
    share = cluster.settings.partitions // len(cluster.evaluators)
    with trio.fail_after(2 * MOST_SECONDS):
        while True:
            found = by_partition(
                await trio.to_thread.run_sync(samples, node), "betrace_partition_current"
            )
            if sum(found.values()) >= share:
                return
            await trio.sleep(0.2)


async def _move(cluster: WholeCluster, found: Watched, number: int) -> tuple[list[float], float]:
    """An evaluator stops and hands over its partitions. For each that moved, the seconds between
    the last message of the former owner and the first of the next, by the servers' clock; and the
    usual distance of messages."""
    before = {partition: len(stored) for partition, stored in found.stored.items()}
    leaver = cluster.evaluators.pop(0)
    leaver.process.terminate()
    await trio.to_thread.run_sync(leaver.process.wait)
    await trio.sleep(2)
    pauses: list[float] = []
    usual: list[float] = []
    for partition, stored in found.stored.items():
        first = max(0, before[partition] - 20)
        for at, ((one, epoch), (two, later)) in enumerate(pairwise(stored[first:]), first + 1):
            if epoch == later:
                usual.append((two - one) / 1e9)
            elif at >= before[partition]:  # not a takeover before
                pauses.append((two - one) / 1e9)
    await _join(cluster, f"after-move-{number}")
    return pauses, sorted(usual)[len(usual) // 2]


async def _kill_leader(cluster: WholeCluster) -> tuple[float, float]:
    """Kill the server that leads most partitions, while requests are sent all the time. Seconds
    until the last refusal was answered (0 without any), and until the last request was answered
    that took longer than a second. The server is started again."""
    layout = Layout.of(cluster.settings)
    streams = [layout.spans_stream(each) for each in range(cluster.settings.partitions)]
    leaders = [cluster.nats.leader(stream).name for stream in streams]
    leader = max(cluster.nats.servers, key=lambda server: leaders.count(server.name))
    refused = slow = 0.0

    async def request(client: httpx.AsyncClient) -> None:
        nonlocal refused, slow
        sent = time.monotonic()
        try:
            status = await _send(client, cluster, os.urandom(16))
        except httpx.HTTPError:
            status = 0
        now = time.monotonic()
        if status != 200:
            refused = max(refused, now - killed)
        elif now - sent > 1:
            slow = max(slow, now - killed)

    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(trust_env=False, timeout=30, limits=limits) as client:
        killed = time.monotonic()
        leader.kill()
        async with trio.open_nursery() as nursery:
            while time.monotonic() - killed < 20:
                nursery.start_soon(request, client)
                await trio.sleep(0.1)
    await trio.to_thread.run_sync(leader.start)
    await trio.to_thread.run_sync(cluster.nats.wait_healthy)
    return refused, slow


# All


async def _measure(options: argparse.Namespace, cluster: WholeCluster) -> Json:
    client = await NatsClient.connect(cluster.settings, "perf")
    layout, watched, found = Layout.of(cluster.settings), Watched(), Json()
    async with trio.open_nursery() as nursery:
        for partition in range(cluster.settings.partitions):
            log = FencedLog(client, layout, partition)
            nursery.start_soon(_follow, log, partition, watched)
        await trio.sleep(3)
        if "signal" in options.only:
            found["signal"] = _quantiles(await _signals(cluster, watched, options.probes))
            _say("signal", found["signal"])
        if "evaluator" in options.only:
            killed = [await _kill_evaluator(cluster, n) for n in range(options.faults)]
            found["evaluator"] = _quantiles(killed)
            _say("evaluator", found["evaluator"])
        if "move" in options.only:
            moves = [await _move(cluster, watched, n) for n in range(options.faults)]
            found["move"] = _quantiles([pause for pauses, _ in moves for pause in pauses])
            found["move"]["usual"] = round(max(usual for _, usual in moves), 3)
            _say("move", found["move"])
        if "leader" in options.only:
            kills = [await _kill_leader(cluster) for _ in range(options.faults)]
            found["leader"] = _quantiles([refused for refused, _ in kills])
            found["leader_slow"] = _quantiles([slow for _, slow in kills])
            _say("leader", found["leader"])
        nursery.cancel_scope.cancel()
    await client.close()
    return found


def _say(kind: str, found: Json) -> None:
    print(f"  {kind}: {found}, load average {os.getloadavg()[0]:.0f}", file=sys.stderr)


def _quantiles(seconds: list[float]) -> Json:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found: Json = {key: round(value_at(ordered, q), 3) for key, q in at.items()}
    return found | {"number": len(ordered), "load_average": round(os.getloadavg()[0], 1)}


def measure(options: argparse.Namespace) -> Json:
    """The kinds of ``options.only``."""
    with whole_cluster(3, options.partitions, 1, 2) as cluster, _load(cluster):
        return trio.run(_measure, options, cluster)


TITLES = {
    "signal": "last span → signal in the log",
    "evaluator": "evaluator killed → its partitions current",
    "move": "planned move: distance of two outputs around it",
    "leader": "NATS leader killed → last refusal",
    "leader_slow": "NATS leader killed → last answer that took more than 1 s",
}


def show(found: Json) -> str:
    """The times as a table."""
    head = ["seconds", "p50", "p99", "greatest", "number", "load average"]
    rows = [
        [
            TITLES[kind] + (f" (usually {row['usual']})" if "usual" in row else ""),
            *(row[key] for key in ("p50", "p99", "max", "number", "load_average")),
        ]
        for kind, row in found.items()
    ]
    load = f"Three replicas, two evaluators, {RATE:,} spans/s of traces that all break a rule."
    return f"{load}\n\n{output.table(head, rows)}"
