"""Panels of storage, breakers, caches, tenants and the process. Thresholds match the alerts in
``alerts.yaml``."""

from grafana.panel import GREEN, RATE, RED, YELLOW, Panel, Query, quantiles, rate

STORAGE = (
    Panel(
        "Span log: written",
        "Bytes a second written to the span log, compressed or not, as received.",
        "Bps",
        (Query(f"sum by (instance) (rate(betrace_span_log_bytes_total{{$on}}{RATE}))"),),
    ),
    Panel(
        "Span log: last sync",
        "Duration of the last sync. With log.ack = synced, clients wait for it. BetraceLogSyncSlow "
        "fires above 0.5 s.",
        "s",
        (Query("betrace_span_log_sync_seconds{$on}"),),
        ((0.1, YELLOW), (0.5, RED)),
    ),
    Panel(
        "Span log: not yet synced",
        "Bytes that would be lost if the machine, not just the process, crashed.",
        "bytes",
        (Query("betrace_span_log_unsynced_bytes{$on}"),),
    ),
    Panel(
        "Disk failures",
        "Failed syncs of the span log, failed checkpoints, and dead letters moved to files, in the "
        "last hour; places of the span log found damaged since the start. Should be 0.",
        "short",
        (
            Query("sum(increase(betrace_span_log_sync_failures_total{$on}[1h]))", "syncs"),
            Query("sum(increase(betrace_checkpoint_failures_total{$on}[1h]))", "checkpoints"),
            Query(
                "sum(increase(betrace_dead_letters_exported_total{$on}[1h]))",
                "dead letters moved",
            ),
            Query("sum(betrace_span_log_damaged_places_total{$on})", "damaged places"),
        ),
        ((1, RED),),
    ),
    Panel(
        "Ledger: time to record a batch of signals",
        "After 5 s a call is abandoned and counts as failed for the breaker.",
        "s",
        quantiles("betrace_ledger_write_latency_seconds", "ledger"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "DuckDB: time to write a batch",
        "After 5 s a call is abandoned and counts as failed for the breaker.",
        "s",
        quantiles("betrace_duckdb_insert_latency_seconds"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "DuckDB: rows",
        "Signals and closed traces a second that become visible to queries.",
        "cps",
        (Query(f"sum by (instance) (rate(betrace_duckdb_rows_total{{$on}}{RATE}))"),),
    ),
    Panel(
        "Waiting in fallbacks",
        "Records in local files, waiting for their store. BetraceFallbackPending fires after 10 "
        "minutes.",
        "short",
        (Query("betrace_fallback_pending{$on}", "{{instance}} {{store}}"),),
        ((1, YELLOW), (100_000, RED)),
    ),
    Panel(
        "Fallbacks: time to write",
        "Time to write records that a store refused to local files, including the sync. No data "
        "while all stores work.",
        "s",
        quantiles("betrace_fallback_write_latency_seconds", "store"),
        ((0.1, YELLOW), (0.5, RED)),
    ),
    Panel(
        "Dead letters",
        "Items that could not be processed, by stage. Should be 0, and must not grow.",
        "short",
        (Query("betrace_dead_letters{$on}", "{{instance}} {{stage}}"),),
        ((1, YELLOW), (100, RED)),
        width=6,
    ),
    Panel(
        "Checkpoint: age",
        "A restart reads everything since then from the span log. BetraceCheckpointOld fires above "
        "5 minutes.",
        "s",
        (
            Query(
                "time() - (betrace_checkpoint_timestamp_seconds{$on} > 0 or "
                "betrace_start_time_seconds{$on})"
            ),
        ),
        ((60, YELLOW), (300, RED)),
        width=6,
    ),
    Panel(
        "Checkpoint: size",
        "Size of the last checkpoint; it grows with the number of open traces.",
        "bytes",
        (Query("betrace_checkpoint_bytes{$on}"),),
        width=6,
    ),
    Panel(
        "Disk: free",
        "Free space in the data directory's file system. BetraceDiskFull fires below 5 %.",
        "percentunit",
        (
            Query(
                'betrace_data_disk_bytes{$on, state="free"} / ignoring (state) sum without (state) '
                "(betrace_data_disk_bytes{$on})"
            ),
        ),
        ((0.05, YELLOW), (0.3, GREEN)),
        base=RED,
        most=1,
        width=6,
    ),
)

_STATE = "betrace_circuit_breaker_state{$on, state="
BREAKERS = (
    Panel(
        "State",
        "Open: calls failed too often and are refused. Half open: trial calls decide. Forced open "
        "and disabled: set by an operator.",
        "short",
        (
            Query(
                f'sum by (instance, name) (0 * {_STATE}"closed"}} or 1 * {_STATE}"half_open"}} or '
                f'2 * {_STATE}"open"}} or 3 * {_STATE}"forced_open"}} or 4 * {_STATE}"disabled"}})',
                "{{instance}} {{name}}",
            ),
        ),
        kind="states",
        width=12,
        least=None,
        states=(
            ("closed", GREEN),
            ("half open", YELLOW),
            ("open", RED),
            ("forced open", "purple"),
            ("disabled", "blue"),
        ),
    ),
    Panel(
        "Unsuccessful calls",
        "Calls a second that failed, timed out, were slow, were cancelled, or were refused because "
        "the breaker was open.",
        "ops",
        (
            Query(
                "sum by (instance, name, kind) "
                f'(rate(betrace_circuit_breaker_calls_total{{$on, kind!="successful"}}{RATE}))',
                "{{name}} {{kind}}",
            ),
        ),
        ((0.01, RED),),
        width=6,
    ),
    Panel(
        "Calls",
        "Successful calls a second.",
        "ops",
        (
            Query(
                "sum by (instance, name) "
                f'(rate(betrace_circuit_breaker_calls_total{{$on, kind="successful"}}{RATE}))',
                "{{name}}",
            ),
        ),
        width=6,
    ),
)

CACHES = (
    Panel(
        "Hit rate",
        "Fraction of look-ups answered from the cache. BetraceCacheHitRateLow fires below 80 % for "
        "rules, 90 % for public keys and 70 % for traces.",
        "percentunit",
        (
            Query(
                rate("betrace_cache_requests_total", "cache", '$on, result="hit"')
                + " / "
                + rate("betrace_cache_requests_total", "cache"),
                "{{instance}} {{cache}}",
            ),
        ),
        ((0.7, YELLOW), (0.8, GREEN)),
        base=RED,
        most=1,
    ),
    Panel(
        "Look-ups",
        "Look-ups a second, by result.",
        "ops",
        (Query(rate("betrace_cache_requests_total", "cache, result"), "{{cache}} {{result}}"),),
        stacked=True,
    ),
    Panel(
        "Hit rate since the start",
        "Fraction of hits since the service started.",
        "percentunit",
        (Query("betrace_cache_hit_ratio{$on}", "{{instance}} {{cache}}"),),
        ((0.7, YELLOW), (0.8, GREEN)),
        base=RED,
        most=1,
    ),
    Panel(
        "Load time",
        "The cost of a miss: mean time to load an entry, including the warm-up.",
        "s",
        (
            Query(
                rate("betrace_cache_load_seconds_total", "cache")
                + " / "
                + rate("betrace_cache_loads_total", "cache"),
                "{{instance}} {{cache}}",
            ),
        ),
        ((0.1, RED),),
        base=GREEN,
        width=12,
    ),
    Panel(
        "Evictions",
        "Entries a second removed because of capacity or age.",
        "ops",
        (Query(rate("betrace_cache_evictions_total", "cache"), "{{instance}} {{cache}}"),),
        width=12,
    ),
)

TENANTS = (
    Panel(
        "Active tenants",
        "Tenants with open or recently closed traces.",
        "short",
        (Query("betrace_active_tenants{$on}"),),
    ),
    Panel(
        "Open traces per tenant",
        "Mean over active tenants. For a single tenant, use the HTTP API: metrics have no tenant "
        "label because the number of tenants is unlimited.",
        "short",
        (Query("betrace_open_traces{$on} / (betrace_active_tenants{$on} > 0)"),),
    ),
    Panel(
        "Requests refused by tenant checks",
        "Requests a second over a tenant's quota, without a valid token, or with an invalid tenant "
        "name.",
        "reqps",
        (
            Query(
                rate(
                    "betrace_requests_refused_total",
                    "reason",
                    '$on, reason=~"quota|unauthenticated|tenant"',
                ),
                "{{reason}}",
            ),
        ),
        ((1, YELLOW),),
    ),
)

PROCESS = (
    Panel(
        "Memory",
        "Resident memory, and the part used by open and recently closed traces.",
        "bytes",
        (
            Query("process_resident_memory_bytes{$on}", "{{instance}} resident"),
            Query("betrace_trace_window_bytes{$on}", "{{instance}} traces"),
        ),
    ),
    Panel(
        "CPU",
        "Cores in use. It can exceed 1 because kernels run without the interpreter's lock.",
        "short",
        (Query(f"rate(process_cpu_seconds_total{{$on}}{RATE})"),),
    ),
    Panel(
        "Open files",
        "Open files and connections, as a fraction of the process's limit.",
        "percentunit",
        (Query("process_open_fds{$on} / process_max_fds{$on}"),),
        ((0.7, YELLOW), (0.9, RED)),
        most=1,
    ),
    Panel(
        "Garbage collections",
        "Collections a second, by generation; generation 2 scans all objects.",
        "ops",
        (Query(rate("python_gc_collections_total", "generation"), "generation {{generation}}"),),
        width=12,
    ),
    Panel(
        "Uptime",
        "Time since the service started. BetraceRestarting fires after three starts in 30 minutes.",
        "s",
        (Query("time() - betrace_start_time_seconds{$on}"),),
        width=12,
    ),
)
