"""CPU a span of all roles, next to the embedded service in the same run, and by the number of
partitions and nodes.

CPU counts from the first span until everything is evaluated, closed and stored. The NATS servers'
is reported apart: they are not a role.

*At once*, all roles share the cores, as on one machine: on few cores the rate is low, so messages
are small. *In turns*, the evaluator is suspended while the edge takes the spans, so that each has
the cores, as on machines of their own.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from contextlib import ExitStack
from typing import Any

from perf.cluster.nodes import IDLE_SECONDS, WholeCluster, whole_cluster
from perf.lib.target import GeneratorProcess, Service, service
from perf.report import output

ROLES = ("edge", "evaluator", "query")
PAIRS = (((4, 1), (64, 1)), ((16, 1), (16, 4)))  # partitions, nodes of a role

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
    return {"all": 1e6 * (target.cpu_seconds() - before) / spans, "payload": payload}


def _clustered(cluster: WholeCluster, options: argparse.Namespace, *, turns: bool = False) -> Json:
    """Microseconds a span by role, of all roles, and of the servers."""
    before, stored = cluster.cpu(), _evaluated(cluster)
    processes = [node.process for node in cluster.evaluators] if turns else []
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        spans, _, _ = _load([edge.ingest for edge in cluster.edges], options)
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
    cluster.settle(stored + spans)
    after = cluster.cpu()
    found: Json = {role: 1e6 * (after[role] - before[role]) / spans for role in after}
    found["all"] = sum(found[role] for role in ROLES)
    found["spans"] = spans
    found["lost"] = spans - (_evaluated(cluster) - stored)
    return found


def _evaluated(cluster: WholeCluster) -> int:
    return sum(int(each["counts"]["spans"]) for each in cluster.partitions())


def _median(rounds: list[Json]) -> Json:
    return {key: round(statistics.median(each[key] for each in rounds), 3) for key in rounds[0]}


def measure_roles(options: argparse.Namespace) -> Json:
    """The roles at R1, at once and in turns, and the embedded service, one after the other."""
    settings = {"traces__idle_seconds": f"{IDLE_SECONDS:g}"}
    rounds: dict[str, list[Json]] = {"embedded": [], "at_once": [], "in_turns": []}
    with whole_cluster(1, options.partitions) as cluster, service(settings=settings) as target:
        for number in range(options.repeats + 1):
            each = {
                "embedded": _embedded(target, options),
                "at_once": _clustered(cluster, options),
                "in_turns": _clustered(cluster, options, turns=True),
            }
            said = ", ".join(f"{name} {row['all']:.2f}" for name, row in each.items())
            print(f"  µs a span: {said}", file=sys.stderr)
            if number:  # the first round warms up
                for name, row in each.items():
                    rounds[name].append(row)
    embedded = rounds["embedded"]
    payload = embedded[0]["payload"]
    for each in embedded:
        del each["payload"]
    found: Json = {name: _median(some) for name, some in rounds.items()}
    for name in ("at_once", "in_turns"):
        pairs = zip(rounds[name], embedded, strict=True)
        found[name]["ratio"] = output.spread([r["all"] / e["all"] for r, e in pairs])
    return found | {"payload": payload}


def measure_scale(options: argparse.Namespace) -> Json:
    """Pairs of clusters with different numbers of partitions and nodes, in turns."""
    found: Json = {}
    for pair in PAIRS:
        rounds: dict[str, list[Json]] = {}
        with ExitStack() as stack:
            clusters = {
                f"P {partitions}, {nodes} × edge and evaluator": stack.enter_context(
                    whole_cluster(1, partitions, nodes, nodes)
                )
                for partitions, nodes in pair
            }
            for number in range(options.repeats + 1):
                for name, cluster in clusters.items():
                    once = {f"{name}, at once": _clustered(cluster, options)}
                    if len(cluster.edges) == 1:
                        turns = _clustered(cluster, options, turns=True)
                        once[f"{name}, in turns"] = turns
                    said = ", ".join(f"{each} {row['all']:.2f}" for each, row in once.items())
                    print(f"  µs a span: {said}", file=sys.stderr)
                    for each, row in once.items():
                        if number:  # the first round warms up
                            rounds.setdefault(each, []).append(row)
        found |= {name: _median(some) for name, some in rounds.items()}
    return found


def _row(name: str, row: Json) -> list[str]:
    return [name, *(f"{row[key]:.2f}" for key in (*ROLES, "all", "servers"))]


HEAD = ["CPU, µs a span", *ROLES, "all roles", "NATS servers"]


def show_roles(found: Json) -> str:
    """The ratios as text."""
    once, turns = found["at_once"], found["in_turns"]
    rows = [_row("cluster, R1, at once", once), _row("cluster, R1, in turns", turns)]
    rows.append(["embedded", "", "", "", f"{found['embedded']['all']:.2f}", ""])
    return "\n\n".join(
        [
            output.table(HEAD, rows),
            f"All roles ÷ embedded: at once {output.shown(once['ratio'])}, in turns "
            f"{output.shown(turns['ratio'])}. "
            f"Evaluator: {1e6 / turns['evaluator']:,.0f} spans per second of its CPU in turns, "
            f"{1e6 / once['evaluator']:,.0f} at once. "
            f"Payload: {output.describe_payload(found['payload'])}.",
        ]
    )


def show_scale(found: Json) -> str:
    """The table of partitions and nodes."""
    return output.table(HEAD, [_row(name, row) for name, row in found.items()])
