"""Panels of the overview, ingestion and the pipeline. Thresholds match the alerts in
``alerts.yaml``."""

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
        "Fraction of spans refused because of overload; clients retry them. BetraceOverload fires "
        "above 1 %.",
        "percentunit",
        (Query(f"{_REFUSED} / ({_REFUSED} + {_ACCEPTED} > 0)", "refused"),),
        ((0.001, YELLOW), (0.01, RED)),
        kind="stat",
        width=3,
    ),
    Panel(
        "Signals",
        "Signals raised in the last hour.",
        "short",
        (Query('sum(increase(betrace_signals_total{$on, kind="raised"}[1h]))', "raised"),),
        kind="stat",
        width=3,
    ),
    Panel(
        "End to end, p99",
        "From the deciding span, or the trace's close, to the signal in the ledger.",
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
        "The highest fill between two scrapes. At 90 % of the first channel, spans are refused.",
        "percentunit",
        (Query("max(betrace_seda_queue_peak{$on} / betrace_seda_queue_capacity{$on})", "fullest"),),
        ((0.7, YELLOW), (0.9, RED)),
        kind="stat",
        width=3,
        most=1,
    ),
    Panel(
        "Breakers not closed",
        "Breakers that are open, half open or disabled. Should be 0.",
        "short",
        (Query('sum(1 - betrace_circuit_breaker_state{$on, state="closed"})', "not closed"),),
        ((1, RED),),
        kind="stat",
        width=3,
    ),
    Panel(
        "Dead letters",
        "Items that stages could not process; they are kept. Should be 0.",
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
        "Estimated spans a second in refused requests. overloaded and memory: the service is "
        "overloaded; quota: a tenant exceeds its quota; others: invalid requests, or the service "
        "is paused or draining.",
        "cps",
        (Query(f"{rate('betrace_spans_refused_total', 'reason')} > 0", "{{reason}}"),),
        ((1, RED),),
        stacked=True,
    ),
    Panel(
        "Spans rejected, repeated, replayed",
        "Rejected: spans with invalid ids. Repeated: sent twice and counted once. Replayed: read "
        "from the span log after a start.",
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
        "In flight: accepted, not yet in their traces. Dead-lettered: a stage failed on them. All "
        "other accepted spans are evaluated, or were discarded by an operator.",
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
        "Content of a channel, including work in progress, as a fraction of its capacity. A full "
        "channel blocks the stage before it. At 90 % of span-ingestion, spans are refused.",
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
        "The highest fill of a channel between two scrapes.",
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
        "Time since a stage with input last finished an item. Above pipeline.stall_seconds (30 s) "
        "the stage is reported as stalled.",
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
        "Stages: items done",
        "Items a second that a stage finished: requests, span batches, or due traces.",
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
        "Items a second that failed, were redelivered, or became dead letters. Should be 0.",
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
        "Time that a stage takes for a batch, including waiting for the next channel.",
        "s",
        quantiles("betrace_stage_latency_seconds", "stage"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "Time to evaluate the rules of a batch",
        "Time in the evaluation thread. After 10 s a batch is abandoned and becomes a dead letter.",
        "s",
        quantiles("betrace_rule_evaluation_latency_seconds"),
        ((1, YELLOW), (10, RED)),
    ),
    Panel(
        "End to end",
        "From the deciding span, or the trace's close, to the signal in the ledger.",
        "s",
        quantiles("betrace_end_to_end_latency_seconds"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "Signals, by severity",
        "Signals a second. Retracted: later spans proved them wrong.",
        "cps",
        (Query(f"{rate('betrace_signals_total', 'severity, kind')} > 0", "{{severity}} {{kind}}"),),
        stacked=True,
    ),
    Panel(
        "Open traces",
        "Traces that may still get spans. Above traces.max_open (1 million), the longest idle are "
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
        "Traces a second. Reopened: spans came late. Recalled: spans came so late that the trace "
        "was read from the log. Partial: not all of it could be read. Closed early: too many "
        "traces were open.",
        "cps",
        (
            Query(f"sum(rate(betrace_traces_closed_total{{$on}}{RATE}))", "closed"),
            Query(f"sum(rate(betrace_traces_reopened_total{{$on}}{RATE}))", "reopened"),
            Query(f"sum(rate(betrace_traces_recalled_total{{$on}}{RATE}))", "recalled"),
            Query(f"sum(rate(betrace_traces_partial_total{{$on}}{RATE}))", "partial"),
            Query(
                f"sum(rate(betrace_traces_closed_for_room_total{{$on}}{RATE}))",
                "closed early",
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
        "Early signals: lead time",
        "How long before the trace closed an early signal was raised.",
        "s",
        quantiles("betrace_early_lead_seconds"),
        width=6,
    ),
)
