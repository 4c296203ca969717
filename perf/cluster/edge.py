"""An edge alone: spans that it acknowledges per second of its own CPU time, bytes of log a span,
and its functions by CPU.

The NATS servers and the generator share the machine's cores, so the rate by the wall clock says
little; the CPU of each process is reported apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import trio

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from betrace.service.storage.jetstream.layout import Layout
from perf.lib import stacks, threads
from perf.lib.target import GeneratorProcess, cpu_seconds
from perf.report import output
from tests.support.cluster_processes import Cluster, Node
from tests.support.nats_servers import NatsServers

RATE_FLOOR = 100_000  # spans/s per core
LOG_FLOOR = 90  # bytes a span
PROFILE_SECONDS = 8

Json = dict[str, Any]


async def _log_size(cluster: ClusterSettings) -> tuple[int, int]:
    """Bytes and messages of all partitions' logs, with the servers' overhead."""
    client = await NatsClient.connect(cluster, "perf")
    layout = Layout.of(cluster)
    size = messages = 0
    for partition in range(cluster.partitions):
        name = layout.spans_stream(partition)
        info = await client.call(lambda nats, name=name: nats.api(f"STREAM.INFO.{name}"))
        size += info["state"]["bytes"]
        messages += info["state"]["messages"]
    await client.close()
    return size, messages


def _profile(edge: Node, form: str, path: Path) -> None:
    sampler = [str(Path(sys.executable).with_name("py-spy")), "record", "--threads"]
    sampler += ["--pid", str(edge.process.pid), "--duration", str(PROFILE_SECONDS)]
    sampler += ["--rate", "200", "--format", form, "--output", str(path)]
    done = subprocess.run(sampler, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"py-spy could not sample the edge: {done.stderr.strip()}")


def _load(url: str, options: argparse.Namespace, seconds: float) -> GeneratorProcess:
    return GeneratorProcess(
        [
            f"--url={url}",
            f"--spans={options.spans}",
            f"--secs={seconds}",
            f"--warm-up={options.warm_up}",
            f"--connections={options.connections}",
        ]
    )


def measure_edge(options: argparse.Namespace, servers: int) -> Json:
    """Measure an edge in front of ``servers`` NATS servers, which all keep each message."""
    with tempfile.TemporaryDirectory(prefix="betrace-perf-") as folder:
        directory = Path(folder)
        with NatsServers(directory / "nats", servers) as nats:
            cluster = nats.settings(partitions=options.partitions)
            processes = Cluster(directory, cluster)
            processes.init()
            with processes.running("edge", "edge") as edge:
                found = _measure(options, edge, [each.pid for each in nats.servers])
                size, messages = trio.run(_log_size, cluster)
                found["log_bytes_per_span"] = round(size / found.pop("all_spans"), 1)
                found["log_bytes_per_message"] = round(size / messages)
                if options.profile:
                    found["functions"] = _functions(options, edge, directory)
    return found


def _measure(options: argparse.Namespace, edge: Node, servers: list[int]) -> Json:
    generator = _load(f"{edge.ingest}/v1/traces", options, options.secs)
    try:
        generator.start()
        generator.wait_begin()
        process, others = psutil.Process(edge.process.pid), [psutil.Process(p) for p in servers]
        used, busy = cpu_seconds(process), sum(map(cpu_seconds, others))
        before, began = threads.threads(process.pid), time.monotonic()
        result = generator.wait_end()
        used, busy = cpu_seconds(process) - used, sum(map(cpu_seconds, others)) - busy
        seconds = time.monotonic() - began
        by_thread = threads.between(
            before, threads.threads(process.pid), seconds, result["spans"], used
        )
    finally:
        generator.stop()
    spans = result["spans"]
    return {
        "spans_per_second": round(spans / seconds),
        "spans_per_cpu_second": round(spans / used),
        "edge_us_per_span": round(1e6 * used / spans, 2),
        "servers_us_per_span": round(1e6 * busy / spans, 2),
        "edge_cores": round(used / seconds, 2),
        "latency_ms": result["latency_ms"],
        "statuses": result["statuses"],
        "errors": result["errors"],
        "all_spans": result["all_spans"],
        "threads": by_thread,
        "payload": generator.payload,
    }


def _functions(options: argparse.Namespace, edge: Node, directory: Path) -> Json:
    """The edge's functions by CPU, while it is sampled."""
    generator = _load(f"{edge.ingest}/v1/traces", options, 600)
    try:
        generator.start()
        generator.wait_begin()
        pid = edge.process.pid
        before, began = threads.threads(pid), time.monotonic()
        used = cpu_seconds(psutil.Process(pid))
        _profile(edge, "raw", directory / "raw")
        used = cpu_seconds(psutil.Process(pid)) - used
        by_thread = threads.between(before, threads.threads(pid), time.monotonic() - began, 0, used)
    finally:
        generator.stop()
    shares = {name: each["share"] for name, each in by_thread.items()}
    return stacks.functions((directory / "raw").read_text(), shares)


def show(rows: dict[str, Json]) -> str:
    """The report as text."""
    head = ["replicas", "spans per CPU second of the edge", "µs a span: edge", "servers"]
    head += ["spans/s", "log, bytes a span", "bytes a message", "p50 ms", "p99 ms"]
    table = [
        [
            replicas,
            f"{row['spans_per_cpu_second']:,} (floor {RATE_FLOOR:,})",
            row["edge_us_per_span"],
            row["servers_us_per_span"],
            f"{row['spans_per_second']:,}",
            f"{row['log_bytes_per_span']} (floor {LOG_FLOOR})",
            row["log_bytes_per_message"],
            row["latency_ms"].get("p50", "-"),
            row["latency_ms"].get("p99", "-"),
        ]
        for replicas, row in rows.items()
    ]
    parts = [output.table(head, table)]
    for replicas, row in rows.items():
        parts.append(f"Replicas {replicas}.\n\n{threads.table(row['threads'])}")
        if "functions" in row:
            parts.append(stacks.table(row["functions"]))
    payload = output.describe_payload(next(iter(rows.values()))["payload"])
    return "\n\n".join([*parts, f"Payload: {payload}."])


def measure(options: argparse.Namespace) -> dict[str, Json]:
    """Measure an edge at each number of replicas."""
    return {str(number): measure_edge(options, number) for number in (1, 3)}
