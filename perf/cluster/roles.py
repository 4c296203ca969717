"""CPU a span of all roles, next to the embedded service in the same run, and by the number of
partitions and nodes.

CPU counts from the first span until everything is evaluated, closed and stored. The NATS servers'
is reported apart: they are not a role.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from perf.cluster.nodes import IDLE_SECONDS, WholeCluster, whole_cluster
from perf.lib.target import GeneratorProcess, Service, service
from perf.report import output

ROLES = ("edge", "evaluator", "query")
SHAPES = ((4, 1), (16, 1), (64, 1), (16, 4))  # partitions, nodes of a role

Json = dict[str, Any]


def _load(urls: list[str], options: argparse.Namespace) -> tuple[int, int, Json]:
    """Send to all URLs at once; spans that were acknowledged, breaches, and the payload."""
    generators: list[GeneratorProcess] = []
    try:
        for url in urls:
            arguments = ["--url", f"{url}/v1/traces", "--spans", str(options.spans)]
            arguments += ["--secs", str(options.secs), "--warm-up", str(options.warm_up)]
            connections = max(1, options.connections // len(urls))
            generators.append(GeneratorProcess([*arguments, "--connections", str(connections)]))
        for generator in generators:
            generator.start()
        for generator in generators:
            generator.wait_begin()
        results = [generator.wait_end() for generator in generators]
    finally:
        for generator in generators:
            generator.stop()
    spans, breaches = (sum(each[key] for each in results) for key in ("all_spans", "all_breaches"))
    return spans, breaches, generators[0].payload


def _embedded(target: Service, options: argparse.Namespace) -> Json:
    before = target.cpu_seconds()
    spans, _, payload = _load([target.ingest], options)
    target.settle(IDLE_SECONDS)
    return {"us": 1e6 * (target.cpu_seconds() - before) / spans, "payload": payload}


def _clustered(cluster: WholeCluster, options: argparse.Namespace) -> Json:
    """Microseconds a span by role, of all roles, and of the servers."""
    before, stored = cluster.cpu(), _evaluated(cluster)
    spans, _, _ = _load([edge.ingest for edge in cluster.edges], options)
    cluster.settle()
    after = cluster.cpu()
    found: Json = {role: 1e6 * (after[role] - before[role]) / spans for role in after}
    found["all"] = sum(found[role] for role in ROLES)
    found["spans"] = spans
    found["evaluated"] = _evaluated(cluster) - stored
    return found


def _evaluated(cluster: WholeCluster) -> int:
    return sum(int(each["counts"]["spans"]) for each in cluster.partitions())


def _median(rounds: list[Json]) -> Json:
    return {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}


def measure_roles(options: argparse.Namespace) -> Json:
    """The roles at R1 and the embedded service, in turns."""
    settings = {"traces__idle_seconds": f"{IDLE_SECONDS:g}"}
    alone: list[Json] = []
    together: list[Json] = []
    with whole_cluster(1, options.partitions) as cluster, service(settings=settings) as target:
        for number in range(options.repeats + 1):
            one, all_roles = _embedded(target, options), _clustered(cluster, options)
            print(f"  embedded {one['us']:.2f}, roles {all_roles['all']:.2f} µs", file=sys.stderr)
            if number:  # the first round warms up
                alone.append(one)
                together.append(all_roles)
    ratios = [r["all"] / e["us"] for r, e in zip(together, alone, strict=True)]
    return {
        "embedded": round(statistics.median(each["us"] for each in alone), 3),
        "roles": _median(together),
        "ratio": output.spread(ratios),
        "payload": alone[0]["payload"],
    }


def measure_scale(options: argparse.Namespace) -> Json:
    """The roles with different numbers of partitions and nodes."""
    found = {}
    for partitions, nodes in SHAPES:
        with whole_cluster(1, partitions, nodes, nodes) as cluster:
            rounds = [_clustered(cluster, options) for _ in range(options.repeats + 1)][1:]
        found[f"P {partitions}, {nodes} × edge and evaluator"] = row = _median(rounds)
        print(f"  P {partitions}, nodes {nodes}: {row['all']:.2f} µs", file=sys.stderr)
    return found


def _row(name: str, row: Json) -> list[str]:
    return [name, *(f"{row[key]:.2f}" for key in (*ROLES, "all", "servers"))]


HEAD = ["CPU, µs a span", *ROLES, "all roles", "NATS servers"]


def show_roles(found: Json) -> str:
    """The ratio as text."""
    rows = [_row("cluster, R1", found["roles"])]
    rows.append(["embedded", "", "", "", f"{found['embedded']:.2f}", ""])
    return "\n\n".join(
        [
            output.table(HEAD, rows),
            f"All roles ÷ embedded: {output.shown(found['ratio'])}. "
            f"Payload: {output.describe_payload(found['payload'])}.",
        ]
    )


def show_scale(found: Json) -> str:
    """The table of partitions and nodes."""
    return output.table(HEAD, [_row(name, row) for name, row in found.items()])
