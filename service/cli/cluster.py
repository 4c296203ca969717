"""``betrace cluster``: the streams in NATS, and what the cluster's processes do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from betrace.service.cli.common import (
    FOUND,
    HELP,
    Duration,
    Failure,
    json_option,
    print_json,
    print_lines,
    print_table,
    settings_options,
    with_client,
)
from betrace.service.cli.doctor.finding import size

if TYPE_CHECKING:
    from betrace.service.config.cluster import ClusterSettings


@click.group("cluster", context_settings=HELP)
def cluster() -> None:
    """Several machines that share the work through NATS JetStream, see [cluster] in config.toml.

    \b
    Examples:
      betrace cluster init --config config.toml
      betrace cluster status --config config.toml
      betrace cluster drain evaluator-2 --config config.toml
      betrace cluster resize --partitions 32 --config config.toml
    """


@cluster.command("init")
@settings_options()
@json_option
def init(config: Path | None, overrides: dict[str, Any], as_json: bool) -> None:
    """Create and check the streams, buckets and the object store.

    May be repeated: existing streams are kept, and their replicas and sizes are adjusted to the
    configuration. The number of partitions is only used to create the cluster; later, `betrace
    cluster resize` changes it.

    \b
    Example:
      betrace cluster init --config config.toml
    """
    from betrace.service.storage.jetstream import setup

    settings = _settings(config, overrides)
    done = with_client(settings, lambda client: setup.set_up(client, settings))
    if as_json:
        print_json({"done": done})
    else:
        print_lines([*done, f"the cluster {settings.prefix} is ready" if done else "all is well"])


@cluster.command("status")
@settings_options()
@json_option
def status(config: Path | None, overrides: dict[str, Any], as_json: bool) -> None:
    """Show NATS servers, nodes and partitions.

    Watches heartbeats for cluster.lease_seconds. Exit code 1 if something needs attention.

    \b
    Example:
      betrace cluster status --config config.toml --json
    """
    from betrace.service.cli.cluster_state import survey_cluster

    settings = _settings(config, overrides)
    state = with_client(settings, lambda client: survey_cluster(client, settings))
    if as_json:
        print_json(state.to_json(), indent=2)
        sys.exit(FOUND if state.problems else 0)
    print_table(
        ("SERVER", "NAME", "VERSION", "STATE"),
        [(s.address, s.name, s.version, s.error or "answers") for s in state.servers],
    )
    print_lines([""])
    print_table(
        ("NODE", "ROLES", "STATE"),
        [
            (
                node.name,
                ", ".join(node.roles),
                "no heartbeat" if not node.alive else "draining" if node.draining else "alive",
            )
            for node in state.nodes
        ],
    )
    print_lines([""])
    print_table(
        ("PARTITION", "OWNER", "EPOCH", "LAG", "MESSAGES", "SIZE", "LEADERS", "REPLICAS"),
        [
            (
                each.partition,
                each.owner or "-",
                "?" if each.epoch is None else each.epoch,
                "?" if each.lag is None else each.lag,
                each.messages,
                size(each.bytes),
                f"{each.leader or '-'}, {each.output_leader or '-'}",
                each.replicas,
            )
            for each in state.partitions
        ],
    )
    if len(state.generations) > 1:
        ranges = [f"{each.first} to {each.first + each.count - 1}" for each in state.generations]
        print_lines(["", f"spans go to the partitions {ranges.pop()}; former: {', '.join(ranges)}"])
    print_lines(["", *(state.problems or ["all is well"])])
    sys.exit(FOUND if state.problems else 0)


@cluster.command("drain")
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let NODE have partitions again.")
@click.option(
    "--wait",
    "seconds",
    type=Duration(),
    default="2m",
    show_default=True,
    help="How long to wait until NODE has no partitions.",
)
@settings_options()
def drain(
    node: str, undo: bool, seconds: int, config: Path | None, overrides: dict[str, Any]
) -> None:
    """Move the partitions of NODE to the other evaluators.

    Each partition pauses for a moment while it moves. NODE gets no partitions until it is stopped
    and started again, or until --undo. Exit code 1 if NODE still has partitions after --wait: there
    is no other evaluator, or NODE does not answer.

    \b
    Example:
      betrace cluster drain evaluator-2 --config config.toml
    """
    from betrace.service.cli.cluster_drain import drain_node, let_back

    settings = _settings(config, overrides)
    if undo:
        with_client(settings, lambda client: let_back(client, settings, node))
        print_lines([f"{node} may have partitions again"])
        return

    def report(number: int) -> None:
        print_lines([f"{node} has {number} partitions"])

    left = with_client(settings, lambda c: drain_node(c, settings, node, seconds, report))
    if left:
        print_lines([f"{node} still has the partitions {', '.join(map(str, left))}"])
        sys.exit(FOUND)


@cluster.command("resize")
@click.option(
    "--partitions",
    type=click.IntRange(1, 1024),
    required=True,
    help="The new number: a multiple of the present one.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option(
    "--wait",
    "seconds",
    type=Duration(),
    default="10m",
    show_default=True,
    help="How long to wait until the former partitions are finished.",
)
@settings_options()
def resize(
    partitions: int, yes: bool, seconds: int, config: Path | None, overrides: dict[str, Any]
) -> None:
    """Divide spans among more partitions, while the cluster works.

    New streams are created, edges send spans there, and the owners of the former partitions
    evaluate what these have and pass open traces on. Each partition pauses for a moment, about as
    long as for a move. All nodes of the cluster must run a version that has this command. The
    number can only be multiplied, and this cannot be undone.

    The nodes carry the change out, so this command may be interrupted: repeat it to see the
    progress. Exit code 1 if former partitions are not finished after --wait: they have no
    evaluator.

    \b
    Example:
      betrace cluster resize --partitions 32 --config config.toml
    """
    from betrace.service.cli.cluster_resize import resize_cluster
    from betrace.service.storage.jetstream.resize import progress

    settings = _settings(config, overrides)
    generations, _ = with_client(settings, lambda client: progress(client, settings))
    before = generations.current.count
    if before != partitions and not yes:
        click.confirm(
            f"Change the cluster {settings.prefix} from {before} to {partitions} partitions? This "
            "cannot be undone.",
            abort=True,
        )

    def report(line: str) -> None:
        print_lines([line])

    left = with_client(settings, lambda c: resize_cluster(c, settings, partitions, seconds, report))
    if left:
        print_lines([f"former partitions that are not finished: {', '.join(map(str, left))}"])
        sys.exit(FOUND)
    print_lines([f"the cluster {settings.prefix} has {partitions} partitions"])


def _settings(config: Path | None, overrides: dict[str, Any]) -> ClusterSettings:
    from betrace.service.config.load import load

    settings = load(config, overrides).cluster
    if settings is None:
        raise Failure(
            f"there is no [cluster] section in {config or 'the defaults'}; add one, name its file "
            "with --config, or set BETRACE_CLUSTER__SERVERS"
        )
    return settings
