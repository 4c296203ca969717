"""What flows: panels at a glance, of ingestion and of the pipeline. Thresholds are those of
``alerts.yaml`` where it has one for the same thing."""

from grafana.panel import RATE, RED, YELLOW, Panel, Query, quantiles, rate

_REFUSED = f'sum(rate(betrace_spans_refused_total{{$on, reason=~"overloaded|memory"}}{RATE}))'
_ACCEPTED = f"sum(rate(betrace_span_ingestion_total{{$on}}{RATE}))"

GLANCE = (
    Panel(
        "Accepted",
        "Spans a second that are in the span log and acknowledged.",
        "cps",
        (Query(_ACCEPTED, "accepted"),),
        kind="stat",
        width=3,
    ),
    Panel(
        "Refused",
        "Part of the spans that overload turned away; clients send them again. Above 1 % "
        "BetraceOverload fires.",
        "percentunit",
        (Query(f"{_REFUSED} / ({_REFUSED} + {_ACCEPTED} > 0)", "refused"),),
        ((0.001, YELLOW), (0.01, RED)),
        kind="stat",
        width=3,
    ),
    Panel(
        "Signals",
        "Breaches raised in the last hour.",
        "short",
        (Query('sum(increase(betrace_signals_total{$on, kind="raised"}[1h]))', "raised"),),
        kind="stat",
        width=3,
    ),
    Panel(
        "End to end, p99",
        "From the last span that mattered, or the trace's close, to the signal in the ledger.",
        "s",
        (
            Query(
                "histogram_quantile(0.99, sum by (le) "
                f"(rate(betrace_end_to_end_latency_seconds_bucket{{$on}}{RATE}))) > 0",
                "p99",
            ),
        ),
        ((1, YELLOW), (5, RED)),
        kind="stat",
        width=3,
    ),
    Panel(
        "Fullest channel",
        "The fullest it was between two scrapes. At 90 % of the first channel spans are refused.",
        "percentunit",
        (Query("max(betrace_seda_queue_peak{$on} / betrace_seda_queue_capacity{$on})", "fullest"),),
        ((0.7, YELLOW), (0.9, RED)),
        kind="stat",
        width=3,
        most=1,
    ),
    Panel(
        "Breakers not closed",
        "Breakers that are open, half open or disabled; closed is how they should be.",
        "short",
        (Query('sum(1 - betrace_circuit_breaker_state{$on, state="closed"})', "not closed"),),
        ((1, RED),),
        kind="stat",
        width=3,
    ),
    Panel(
        "Dead letters",
        "What stages could not process and keep. Should be 0.",
        "short",
        (Query("sum(betrace_dead_letters{$on})", "dead letters"),),
        ((1, YELLOW), (100, RED)),
        kind="stat",
        width=3,
    ),
    Panel(
        "Waiting in fallbacks",
        "Records in local files until their store takes them again. Should be 0.",
        "short",
        (Query("sum(betrace_fallback_pending{$on})", "pending"),),
        ((1, YELLOW), (100_000, RED)),
        kind="stat",
        width=3,
    ),
)

INGESTION = (
    Panel(
        "Spans accepted",
        "Spans a second that are in the span log and acknowledged.",
        "cps",
        (Query(f"sum by (instance) (rate(betrace_span_ingestion_total{{$on}}{RATE}))"),),
    ),
    Panel(
        "Spans refused, by reason",
        "Estimated spans a second of requests that were not accepted. overloaded and memory: the "
        "service has more than it can do; quota: a tenant has; the others are faults of requests, "
        "or the service pauses or drains.",
        "cps",
        (Query(f"{rate('betrace_spans_refused_total', 'reason')} > 0", "{{reason}}"),),
        ((1, RED),),
        stacked=True,
    ),
    Panel(
        "Spans left out, repeated, replayed",
        "Rejected: with ids that are none. Repeated: sent twice and counted once. Replayed: read "
        "back from the span log at the start.",
        "cps",
        (
            Query(f"sum(rate(betrace_spans_rejected_total{{$on}}{RATE}))", "rejected"),
            Query(f"sum(rate(betrace_spans_repeated_total{{$on}}{RATE}))", "repeated"),
            Query(f"sum(rate(betrace_spans_replayed_total{{$on}}{RATE}))", "replayed"),
        ),
    ),
    Panel(
        "Requests refused, by reason",
        "Export requests a second that were answered with an error.",
        "reqps",
        (Query(f"{rate('betrace_requests_refused_total', 'reason')} > 0", "{{reason}}"),),
        ((1, RED),),
        width=12,
        stacked=True,
    ),
    Panel(
        "Where accepted spans are",
        "In flight: accepted and not yet in their traces. Dead-lettered: a stage failed on them. "
        "What was accepted is always evaluated, one of these, or discarded by an operator.",
        "short",
        (
            Query("sum(betrace_spans_in_flight{$on})", "in flight"),
            Query("sum(betrace_spans_dead_lettered{$on})", "dead-lettered"),
        ),
        width=12,
    ),
)

PIPELINE = (
    Panel(
        "Channels: fill",
        "What is in a channel, being worked on included, as a part of its capacity. A full channel "
        "makes the stage before it wait; at 90 % of span-ingestion spans are refused.",
        "percentunit",
        (
            Query(
                "betrace_seda_queue_size{$on} / betrace_seda_queue_capacity{$on}",
                "{{queue}}",
            ),
        ),
        ((0.7, YELLOW), (0.9, RED)),
        most=1,
    ),
    Panel(
        "Channels: peak",
        "The fullest that a channel was between two scrapes.",
        "percentunit",
        (
            Query(
                "betrace_seda_queue_peak{$on} / betrace_seda_queue_capacity{$on}",
                "{{queue}}",
            ),
        ),
        ((0.7, YELLOW), (0.9, RED)),
        most=1,
    ),
    Panel(
        "Stages: without progress",
        "How long ago a stage last finished something, while it has input. Above "
        "pipeline.stall_seconds (30 s) it is reported as stalled.",
        "s",
        (
            Query(
                "(time() - (betrace_stage_last_progress_timestamp_seconds{$on} > 0)) and on "
                '(instance, stage) label_replace(betrace_seda_queue_size{$on} > 0, "stage", '
                '"$1", "queue", "(.*)")',
                "{{stage}}",
            ),
        ),
        ((10, YELLOW), (30, RED)),
    ),
    Panel(
        "Stages: batches done",
        "Items a second that a stage finished: requests, batches of spans, traces that are due.",
        "ops",
        (
            Query(
                rate("betrace_stage_items_total", "stage", '$on, outcome="done"'),
                "{{stage}}",
            ),
        ),
    ),
    Panel(
        "Stages: failures",
        "Items a second that failed, were given again, or became dead letters. Should be 0.",
        "ops",
        (
            Query(
                "sum by (instance, stage, outcome) "
                f'(rate(betrace_stage_items_total{{$on, outcome!="done"}}{RATE}))',
                "{{stage}} {{outcome}}",
            ),
        ),
        ((0.01, RED),),
    ),
    Panel(
        "Stages: time for a batch",
        "How long a stage works on a batch, what it waits for the next channel included.",
        "s",
        quantiles("betrace_stage_latency_seconds", "stage"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "Time to decide the rules of a batch",
        "In the thread that evaluates. Above 10 s a batch is given up and becomes a dead letter.",
        "s",
        quantiles("betrace_rule_evaluation_latency_seconds"),
        ((1, YELLOW), (10, RED)),
    ),
    Panel(
        "End to end",
        "From the last span that mattered, or the trace's close, to the signal in the ledger.",
        "s",
        quantiles("betrace_end_to_end_latency_seconds"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "Signals, by severity",
        "Signals a second; retracted are those that later spans proved wrong.",
        "cps",
        (Query(f"{rate('betrace_signals_total', 'severity, kind')} > 0", "{{severity}} {{kind}}"),),
        stacked=True,
    ),
    Panel(
        "Open traces",
        "Traces that may still get spans. Above traces.max_open (1 million) those idle longest are "
        "closed early.",
        "short",
        (
            Query("betrace_open_traces{$on}", "{{instance}} open"),
            Query("betrace_long_lived_traces{$on}", "{{instance}} long-lived"),
        ),
        ((750_000, YELLOW), (1_000_000, RED)),
        width=6,
    ),
    Panel(
        "Traces closed and reopened",
        "Traces a second. Reopened: spans came late. Recalled: so late that the trace was read "
        "from the log. Partial: not all of it could be. For room: more were open than may be.",
        "cps",
        (
            Query(f"sum(rate(betrace_traces_closed_total{{$on}}{RATE}))", "closed"),
            Query(f"sum(rate(betrace_traces_reopened_total{{$on}}{RATE}))", "reopened"),
            Query(f"sum(rate(betrace_traces_recalled_total{{$on}}{RATE}))", "recalled"),
            Query(f"sum(rate(betrace_traces_partial_total{{$on}}{RATE}))", "partial"),
            Query(
                f"sum(rate(betrace_traces_closed_for_room_total{{$on}}{RATE}))",
                "closed for room",
            ),
        ),
        width=6,
    ),
    Panel(
        "Early signals",
        "Signals a second raised before their trace had closed.",
        "cps",
        (Query(f"sum(rate(betrace_signals_early_total{{$on}}{RATE}))", "early signals"),),
        width=6,
    ),
    Panel(
        "Early signals: time won",
        "How long before their close traces were signalled.",
        "s",
        quantiles("betrace_early_lead_seconds"),
        width=6,
    ),
)
