"""The performance floors and the figures of the last runs, as rows of the report's table.

A floor whose program was not run still has a row, which names the command to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from perf.report import hints
from perf.report.hints import Hint

Json = dict[str, Any]
Runs = dict[str, Json]  # by the name of the JSON file in perf/out

REACHED, MISSED, NOT_RUN = "reached", "**missed**", "not run"
RATE = 100_000
MOST_ERRORS = 0.001
FLAT = 1.2


@dataclass(frozen=True, slots=True)
class Floor:
    """A row of the table: topic, subject, the minimum, and the command that measures it.

    ``read`` returns the figure as text, and whether it is good enough. It raises KeyError or
    IndexError if the run is missing.
    """

    topic: str
    what: str
    floor: str
    command: str
    read: Callable[[Runs], tuple[str, bool]]
    hint: Hint | str = ""  # where to look first if it is missed


def _load(name: str, spans: int, least: float) -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        values = runs[name]
        found = values["rows"][str(spans)]["summary"]
        rate, errors = found["spans_per_second"]["median"], found["error_rate"]["max"]
        good = rate >= least and errors < MOST_ERRORS and not values["problems"]
        said = f"{rate:,.0f} spans/s, {errors:.2%} errors"
        said += f", generator {found['generator_cores']['median']:.2f} cores"
        return said, good

    return read


def _of_load(
    name: str, spans: int, part: Callable[[Json], float], most: float, unit: str
) -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        value = part(runs[name]["rows"][str(spans)])
        return f"{value:,.2f} {unit}", value < most

    return read


def _bench(
    group: str, name: str, least: float = 0.0, most_us: float = 0.0
) -> Callable[[Runs], tuple[str, bool]]:
    """Check for at least ``least`` items a second, or for a p99 below ``most_us``."""

    def read(runs: Runs) -> tuple[str, bool]:
        found = runs["bench"][group][name]
        rate, p99 = found["items_per_second"], found["p99_us"]
        if most_us:
            return f"p99 {p99 / 1000:,.3f} ms, p50 {found['p50_us'] / 1000:,.3f}", p99 < most_us
        by_cpu = 1e6 * found["items"] / found["cpu_us"]["median"]
        return f"{rate:,} a second; {by_cpu:,.0f} by CPU time", rate >= least

    return read


def _tigerbeetle(runs: Runs) -> tuple[str, bool]:
    ours, bare = hints.ledgers(runs)
    p50, p99, p99_bare = (us / 1000 for us in (ours["p50_us"], ours["p99_us"], bare["p99_us"]))
    without = runs["bench"]["ledger"]["tigerbeetle 128"]["p99_us"] / 1000
    return (
        f"20 a second: p99 {p99:.1f} ms, p50 {p50:.1f} (bare client: p99 {p99_bare:.1f} ms); "
        f"without a pause: p99 {without:.1f} ms",
        p99 < 5,
    )


def _end_to_end(key: str) -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        found = runs["bench"]["end_to_end"][key]
        return f"p50 {found['p50']:.0f}, p99 {found['p99']:.0f} ms", found["p99"] < 500

    return read


def _queueing(runs: Runs) -> tuple[str, bool]:
    stages = {name: ms for name, ms in runs["soak"]["queueing_ms"].items() if name != "projection"}
    rate = runs["soak"]["options"]["rate"]
    said = ", ".join(f"{name} {ms:g}" for name, ms in stages.items())
    return f"{said} ms at {rate:,.0f} spans/s", max(stages.values()) < 10


def _long_traces(runs: Runs) -> tuple[str, bool]:
    points = runs["curves"]["curves"]["trace_length"]["points"]
    most = max(points, key=lambda p: float(p["memory"]["bytes_per_trace"]))
    size = most["memory"]["bytes_per_trace"]
    longest = points[-1]["x"]
    return f"{size / 1000:.1f} kB at most, up to {longest:,} spans", size < 1_000_000


def _relations(runs: Runs) -> tuple[str, bool]:
    found = runs["relations"]["service"]
    said = f"{found['ratio']['median']:.2f} × ({found['relational_us']['median']:.2f} µs a span)"
    return said, found["ratio"]["median"] <= 1.5


def _relations_memory(runs: Runs) -> tuple[str, bool]:
    values = runs["relations"]
    points = {p["spans"]: p["peak_mb"] for p in values["trace_length"]}
    longest = max(points)
    bound = max(mb for spans, mb in points.items() if spans <= values["spans_max"])
    return f"{points[longest]:.1f} MB at {longest:,} spans", points[longest] <= bound


def _many_long(runs: Runs) -> tuple[str, bool]:
    many = runs["curves"]["many_long_traces"]
    said = f"{many['bytes_per_trace']:,} bytes a trace, RSS {many['rss_growth_mb']:+} MB"
    return said, many["bytes_per_trace"] < 1_000_000


def _hit_rate(name: str, least: float) -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        rate = runs["cachehits"]["caches"][name]["hitRate"]
        return f"{rate:.1%}", rate >= least

    return read


def _overload(runs: Runs) -> tuple[str, bool]:
    found = runs["overload"]
    row = found["rows"]["twice that"]
    said = (
        f"{row['taken']:,.0f} of {row['offered']:,.0f} spans/s taken, "
        f"{row['refusals']:,} refusals, "
        f"accepted {found['accepted']:,} = evaluated {found['evaluated']:,}"
    )
    return said, not found["problems"]


def _soak(key: str) -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        judged = runs["soak"]["judged"]
        first, last = runs["soak"]["slices"][0], runs["soak"]["slices"][-1]
        return f"{judged['ratio'][key]:.2f} ({first[key]:,} → {last[key]:,})", judged["good"][key]

    return read


def _soak_lasted(runs: Runs) -> tuple[str, bool]:
    options, run = runs["soak"]["options"], runs["soak"]["run"]
    said = f"{run['spans_per_second']:,.0f} spans/s for {options['secs']:g} s"
    good = run["spans_per_second"] >= 49_500 and options["secs"] >= 300
    return said, good and not runs["soak"]["problems"]


def _memory(part: str) -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        ((_, found),) = [(n, v) for n, v in runs["memory"]["cases"].items() if part in n] or [
            ("", None)
        ]
        if found is None:
            raise KeyError(part)
        floor = found["floor_mb"]
        return f"{found['growth_mb']} MB", floor is None or found["growth_mb"] < floor

    return read


def _many_tenants(runs: Runs) -> tuple[str, bool]:
    row = runs["load-500"]["rows"]["100"]["summary"]
    rate, rss = row["spans_per_second"]["median"], row["rss_mb"]["median"]
    return f"{rate:,.0f} spans/s, RSS {rss:,.0f} MB", rate >= RATE


def _queries(runs: Runs) -> tuple[str, bool]:
    found = runs["queries"]
    pages = {n: a["ms"]["median"] for n, a in found["answers"].items() if "page of" in n}
    slow = [name for name in found["slower_than_100_ms"] if name in pages]
    return f"{max(pages.values()):.0f} ms at most, {found['traces']:,} traces", not slow


def _regress(runs: Runs) -> tuple[str, bool]:
    found = runs["regress"]
    slower = found["slower"]
    said = f"slower: {', '.join(slower)}" if slower else f"{len(found['figures'])} figures"
    return said, not slower


def _curve(name: str, key: str = "ratio") -> Callable[[Runs], tuple[str, bool]]:
    def read(runs: Runs) -> tuple[str, bool]:
        points = runs["curves"]["curves"][name]["points"]
        values = [p[key]["median"] if isinstance(p[key], dict) else p[key] for p in points]
        growth = max(values) / values[0]
        return f"greatest ÷ first {growth:.2f}", growth <= FLAT

    return read


FLOORS: tuple[Floor, ...] = (
    Floor("storage", "span log: decode, append (1000 spans a call)", "100,000 spans/s", "bench",
          _bench("ingestion", "stage 1000", RATE),
          hints.slow_benchmark("ingestion", "stage 1000")),
    Floor("storage", "ledger: TigerBeetle, batch of 128", "p99 < 5 ms", "bench", _tigerbeetle,
          hints.tigerbeetle),
    Floor("storage", "DuckDB: signals, 1000 a transaction", "50,000 rows/s", "bench",
          _bench("duckdb", "signals 1000", 50_000), hints.slow_benchmark("duckdb", "signals 1000")),
    Floor("storage", "DuckDB: traces, 1000 a transaction", "50,000 rows/s", "bench",
          _bench("duckdb", "traces 1000", 50_000), hints.slow_benchmark("duckdb", "traces 1000")),
    Floor("storage", "500 tenants writing at once, 50 rules each", "100,000 spans/s", "report",
          _many_tenants, hints.load("load-500", 100, "flamegraph-500")),
    Floor("storage", "pages of signals and traces", "< 100 ms", "queries", _queries, hints.queries),
    Floor("speed", "over HTTP, 100 spans a request, 100 rules", "100,000 spans/s", "load",
          _load("load", 100, RATE), hints.load("load", 100, "flamegraph")),
    Floor("speed", "over HTTP, 512 spans a request, 100 rules", "100,000 spans/s", "load",
          _load("load", 512, RATE), hints.load("load", 512)),
    Floor("speed", "evaluation of a 100-span batch, 100 rules", "p99 < 100 ms", "bench",
          _bench("evaluation", "batch 100", most_us=100_000),
          hints.tail("evaluation", "batch 100", 100_000)),
    Floor("speed", "in a channel on average, work included", "< 10 ms a stage", "soak", _queueing,
          hints.queueing),
    Floor("speed", "last needed span to signal in the ledger", "p99 < 500 ms", "bench",
          _end_to_end("ledger_ms")),
    Floor("speed", "last needed span to signal in the API", "p99 < 500 ms", "bench",
          _end_to_end("api_ms"), "DuckDB commits rows in groups"),
    Floor("speed", "20 of 100 rules relate spans, one trace in ten a candidate", "1.5 × the CPU",
          "relations", _relations, "reading and judging candidates: the section Relations"),
    Floor("trace memory", "an open trace of any length", "< 1 MB", "curves", _long_traces),
    Floor("trace memory", "judging a candidate of any length", "at most that of its setting",
          "relations", _relations_memory),
    Floor("trace memory", "500 traces of 10,000 spans at once", "no growth, < 1 MB", "curves",
          _many_long),
    Floor("caches", "hit rate: rule sets", "80 %", "cachehits", _hit_rate("ruleContainers", 0.8),
          hints.cache("ruleContainers")),
    Floor("caches", "hit rate: public keys", "90 %", "cachehits", _hit_rate("publicKeys", 0.9),
          hints.cache("publicKeys")),
    Floor("caches", "hit rate: trace metadata", "70 %", "cachehits",
          _hit_rate("traceMetadata", 0.7), hints.cache("traceMetadata")),
    *(
        Floor("caches", f"cache {name}", f"p99 < {most // 1000} ms", "bench",
              _bench("caches", name, most_us=most), hints.tail("caches", name, most))
        for cache in ("rules", "key", "trace")
        for name, most in ((f"{cache}, hit", 1000), (f"{cache}, miss", 100_000))
    ),
    Floor("fallback", "fallback files: 128 signals, synced", "< 10 ms", "bench",
          _bench("fallback", "files 128", most_us=10_000),
          hints.tail("fallback", "files 128", 10_000)),
    Floor("load", "10 tenants, 100 rules, 60 s, 100 spans a request", "100,000 spans/s, < 0.1 %",
          "report", _load("load-tenants", 100, RATE), hints.load("load-tenants", 100)),
    Floor("load", "10 tenants, 100 rules, 60 s, 512 spans a request", "100,000 spans/s, < 0.1 %",
          "report", _load("load-tenants", 512, RATE), hints.load("load-tenants", 512)),
    Floor("load", "twice what it takes", "refuses, survives, loses nothing", "overload", _overload,
          hints.overload),
    Floor("load", "soak", "50,000 spans/s for 5 min", "soak", _soak_lasted, hints.queueing),
    Floor("load", "soak, last minute ÷ first: spans/s", "within 10 %", "soak",
          _soak("spans_per_second"), hints.soak),
    Floor("load", "soak, last minute ÷ first: CPU a span", "within 10 %", "soak",
          _soak("cpu_us_per_span"), hints.soak),
    Floor("load", "soak, last minute ÷ first: p99 of a request", "within 10 %", "soak",
          _soak("p99_ms"), hints.soak),
    Floor("load", "soak, last minute ÷ first: RSS", "flat", "soak", _soak("rss_mb"),
          hints.soak_memory),
    Floor("load", "1000 traces of 100 spans, evaluation of each", "p99 < 100 ms", "bench",
          _bench("evaluation", "1000 traces of 100", most_us=100_000),
          hints.tail("evaluation", "1000 traces of 100", 100_000)),
    Floor("load", "1000 create/delete cycles of a tenant", "< 100 MB", "memory", _memory("cycles"),
          hints.memory),
    Floor("load", "one tenant, 100 rules, 1000 live spans", "< 50 MB", "memory",
          _memory("one tenant")),
    Floor("load", "500 tenants with 50 rules each", "–", "memory", _memory("500 tenants")),
    Floor("load", "nothing slower than accepted", "90 % of each", "regress", _regress),
    Floor("goal", "512 spans a request", "400,000 spans/s", "load", _load("load", 512, 400_000),
          hints.load("load", 512)),
    Floor("goal", "100 spans a request", "200,000 spans/s", "load", _load("load", 100, 200_000),
          hints.load("load", 100, "flamegraph")),
    *(
        Floor("goal", f"CPU a span, {spans} a request", "≤ 4 µs", "load",
              _of_load("load", spans, lambda r: float(r["summary"]["cpu_us_per_span"]["median"]),
                       4.0, "µs"),
              hints.load("load", spans, "flamegraph"))
        for spans in (512, 100)
    ),
    *(
        Floor("goal", f"p99 of a request, {spans} a request", "< 50 ms", "load",
              _of_load("load", spans, lambda r: float(r["latency_ms"]["p99"]["median"]),
                       50.0, "ms"),
              hints.waits("load", spans))
        for spans in (512, 100)
    ),
    *(
        Floor("curve", f"CPU a span is flat over {what}", "within 20 %", "curves", _curve(name),
              hints.curve(name))
        for name, what in (
            ("trace_length", "spans in a trace"),
            ("open_traces", "open traces"),
            ("rules", "rules of a tenant"),
            ("tenants", "tenants, while the load runs"),
        )
    ),
    Floor("curve", "CPU a span is flat over tenants, until all is stored", "within 20 %", "curves",
          _curve("tenants", "to_the_end_us"),
          hints.curve("tenants", "to_the_end_us", "threads_to_the_end")),
)  # fmt: skip


def rows(runs: Runs) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Yield the rows of the table: topic, subject, floor, reached, verdict, hint."""
    for floor in FLOORS:
        head = (floor.topic, floor.what, floor.floor)
        try:
            said, good = floor.read(runs)
        except (KeyError, IndexError):
            yield (*head, f"`make {floor.command}`", NOT_RUN, "")
            continue
        yield (
            *head,
            said,
            REACHED if good else MISSED,
            "" if good else hints.said(floor.hint, runs),
        )


HEAD = ("", "", "floor", "reached", "")
