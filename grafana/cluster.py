"""Panels of a cluster: its partitions and nodes. They have no data without a cluster. Thresholds
match the alerts in ``alerts.yaml``."""

from __future__ import annotations

from grafana.panel import RATE, RED, YELLOW, Panel, Query

CLUSTER = (
    Panel(
        "Nodes",
        "Processes of the cluster that answer Prometheus.",
        "short",
        (Query("count(betrace_cluster_node_info{$on})", "nodes"),),
        kind="stat",
        width=4,
    ),
    Panel(
        "Partitions without owner",
        "Nobody evaluates them; their spans are kept. Should be 0 except during a takeover. "
        "BetracePartitionWithoutOwner fires after a minute.",
        "short",
        (
            Query(
                "count(sum by (job, partition) (betrace_partition_owned{$on}) == 0) or vector(0)",
                "without owner",
            ),
        ),
        ((1, RED),),
        kind="stat",
        width=5,
    ),
    Panel(
        "Partitions that take no spans",
        "At the edge that sees most of them. Should be 0 except while NATS elects a leader. "
        "BetraceNoQuorum fires if it lasts.",
        "short",
        (Query("max(betrace_edge_unavailable_partitions{$on})", "unavailable"),),
        ((1, RED),),
        kind="stat",
        width=5,
    ),
    Panel(
        "Largest lag",
        "Age of the oldest span that was not evaluated. BetracePartitionLagging fires above 30 s.",
        "s",
        (Query("max(betrace_partition_lag_seconds{$on})", "lag"),),
        ((5, YELLOW), (30, RED)),
        kind="stat",
        width=5,
    ),
    Panel(
        "Oldest checkpoint",
        "A successor replays what came after it.",
        "s",
        (Query("max(betrace_partition_checkpoint_age_seconds{$on})", "age"),),
        ((300, YELLOW),),
        kind="stat",
        width=5,
    ),
    Panel(
        "Partitions, by evaluator",
        "How many partitions each evaluator owns. They move when an evaluator comes or goes.",
        "short",
        (Query("sum by (instance) (betrace_partition_owned{$on})"),),
        stacked=True,
    ),
    Panel(
        "Lag, by partition",
        "Messages in a partition's log that its evaluator has not read.",
        "short",
        (Query("max by (partition) (betrace_partition_lag_messages{$on})", "{{partition}}"),),
    ),
    Panel(
        "Log time behind the clock",
        "Traces are closed by log time, which stops while a partition's log takes nothing, and "
        "does not catch up. It should rise only in an outage.",
        "s",
        (
            Query(
                "max by (partition) (time() - betrace_partition_log_time_seconds{$on})",
                "{{partition}}",
            ),
        ),
    ),
    Panel(
        "Epochs, by partition",
        "The number of the owner's epoch. Each takeover begins a new one.",
        "short",
        (Query("max by (partition) (betrace_partition_epoch{$on})", "{{partition}}"),),
    ),
    Panel(
        "Takeovers and their trouble",
        "In the last hour. Fenced: an evaluator was cut off or frozen, and noticed that another "
        "had its partition. Gaps: acknowledged messages are missing from a log.",
        "short",
        (
            Query("sum(increase(betrace_partition_takeovers_total{$on}[1h]))", "takeovers"),
            Query("sum(increase(betrace_partition_fenced_total{$on}[1h]))", "fenced"),
            Query("sum(increase(betrace_partition_failures_total{$on}[1h]))", "failed"),
            Query(
                "sum(increase(betrace_partition_unusable_checkpoints_total{$on}[1h]))",
                "unusable checkpoints",
            ),
            Query("sum(betrace_partition_gaps_total{$on})", "gaps"),
        ),
    ),
    Panel(
        "Query nodes: messages to apply",
        "Messages with signals and closed traces that a query node has not stored yet.",
        "short",
        (Query("sum by (instance) (betrace_cluster_apply_lag_messages{$on})"),),
    ),
    Panel(
        "Edges: spans stored",
        "Spans a second that a quorum of the NATS servers has stored.",
        "cps",
        (Query(f"sum by (instance) (rate(betrace_edge_log_spans_total{{$on}}{RATE}))"),),
        width=12,
    ),
    Panel(
        "Edges: messages not stored, by reason",
        "Their requests were answered with 503. no_quorum: not acknowledged in time; full: the "
        "stream has no space left.",
        "ops",
        (
            Query(
                f"sum by (reason) (rate(betrace_edge_failed_messages_total{{$on}}{RATE}))",
                "{{reason}}",
            ),
        ),
        ((0.01, RED),),
        width=12,
        stacked=True,
    ),
)
