"""What it flows through: panels of storage, breakers, caches, tenants and the process. Thresholds
are those of ``alerts.yaml`` where it has one for the same thing."""

from grafana.panel import GREEN, RATE, RED, YELLOW, Panel, Query, quantiles, rate

STORAGE = (
    Panel(
        "Span log: written",
        "Bytes a second that go to the span log, as they came: compressed or not.",
        "Bps",
        (Query(f"sum by (instance) (rate(betrace_span_log_bytes_total{{$on}}{RATE}))"),),
    ),
    Panel(
        "Span log: last sync",
        "How long the disk took. With log.ack = synced clients wait for it. Above 0.5 s "
        "BetraceLogSyncSlow fires.",
        "s",
        (Query("betrace_span_log_sync_seconds{$on}"),),
        ((0.1, YELLOW), (0.5, RED)),
    ),
    Panel(
        "Span log: not yet safe",
        "Bytes that the death of the machine, not of the process, would lose.",
        "bytes",
        (Query("betrace_span_log_unsynced_bytes{$on}"),),
    ),
    Panel(
        "What the disk failed",
        "Syncs of the span log, checkpoints that could not be written, and dead letters that had "
        "to be moved to files, in the last hour. Should be 0.",
        "short",
        (
            Query("sum(increase(betrace_span_log_sync_failures_total{$on}[1h]))", "syncs"),
            Query("sum(increase(betrace_checkpoint_failures_total{$on}[1h]))", "checkpoints"),
            Query(
                "sum(increase(betrace_dead_letters_exported_total{$on}[1h]))",
                "dead letters moved",
            ),
        ),
        ((1, RED),),
    ),
    Panel(
        "Ledger: time to record a batch of signals",
        "Above 5 s a call is given up and counts as failed for the breaker.",
        "s",
        quantiles("betrace_ledger_write_latency_seconds", "ledger"),
        ((1, YELLOW), (5, RED)),
    ),
    Panel(
        "DuckDB: time to write a batch",
        "Above 5 s a call is given up and counts as failed for the breaker.",
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
        "Records in local files until their store takes them again. After 10 minutes "
        "BetraceFallbackPending fires.",
        "short",
        (Query("betrace_fallback_pending{$on}", "{{instance}} {{store}}"),),
        ((1, YELLOW), (100_000, RED)),
    ),
    Panel(
        "Fallbacks: time to write",
        "What a store did not take goes to local files, the disk's sync included. Without data "
        "while all stores are well.",
        "s",
        quantiles("betrace_fallback_write_latency_seconds", "store"),
        ((0.1, YELLOW), (0.5, RED)),
    ),
    Panel(
        "Dead letters",
        "What stages could not process, by stage. Should be 0, and must not grow.",
        "short",
        (Query("betrace_dead_letters{$on}", "{{instance}} {{stage}}"),),
        ((1, YELLOW), (100, RED)),
        width=6,
    ),
    Panel(
        "Checkpoint: age",
        "A restart reads what came since from the span log. Above 5 minutes BetraceCheckpointOld "
        "fires.",
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
        "Of the last checkpoint that was written; it grows with the open traces.",
        "bytes",
        (Query("betrace_checkpoint_bytes{$on}"),),
        width=6,
    ),
    Panel(
        "Disk: free",
        "Of the file system of the data directory. Below 5 % BetraceDiskFull fires.",
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
        "Open: what it protects failed too often and is left alone. Half open: trial calls decide. "
        "Forced open and disabled are an operator's doing.",
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
        "Calls that did not go well",
        "Calls a second that failed, took too long, were slow, cancelled, or were not made since "
        "the breaker is open.",
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
        "Part of the look-ups that were answered from the cache. Below 80 % for rules, 90 % for "
        "public keys or 70 % for traces BetraceCacheHitRateLow fires.",
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
        "Part of all look-ups since the service started.",
        "percentunit",
        (Query("betrace_cache_hit_ratio{$on}", "{{instance}} {{cache}}"),),
        ((0.7, YELLOW), (0.8, GREEN)),
        base=RED,
        most=1,
    ),
    Panel(
        "Time of a load",
        "What a miss costs: the mean time of the loads, those of warm-up included.",
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
        "Entries a second that left for room or age.",
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
        "Open traces for a tenant",
        "The mean. What each tenant has is asked of the HTTP interface: metrics have no label for "
        "tenants, of which there may be any number.",
        "short",
        (Query("betrace_open_traces{$on} / (betrace_active_tenants{$on} > 0)"),),
    ),
    Panel(
        "Refused for a tenant's sake",
        "Requests a second over a tenant's quota, without a valid token, or with a name that is "
        "none.",
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
        "Resident memory, and what of it open and recently closed traces take.",
        "bytes",
        (
            Query("process_resident_memory_bytes{$on}", "{{instance}} resident"),
            Query("betrace_trace_window_bytes{$on}", "{{instance}} traces"),
        ),
    ),
    Panel(
        "CPU",
        "Cores in use. Kernels run without the interpreter's lock, so more than one is possible.",
        "short",
        (Query(f"rate(process_cpu_seconds_total{{$on}}{RATE})"),),
    ),
    Panel(
        "Open files",
        "Files and connections, as a part of what the process may have.",
        "percentunit",
        (Query("process_open_fds{$on} / process_max_fds{$on}"),),
        ((0.7, YELLOW), (0.9, RED)),
        most=1,
    ),
    Panel(
        "Garbage collections",
        "Collections a second, by generation; those of generation 2 look at everything.",
        "ops",
        (Query(rate("python_gc_collections_total", "generation"), "generation {{generation}}"),),
        width=12,
    ),
    Panel(
        "Up for",
        "Since the start of the service. Three starts within half an hour fire BetraceRestarting.",
        "s",
        (Query("time() - betrace_start_time_seconds{$on}"),),
        width=12,
    ),
)
