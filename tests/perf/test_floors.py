"""Each floor's verdict at its limit, and the hints for missed floors."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from perf.report import floors, hints
from perf.report.floors import MISSED, NOT_RUN, REACHED

Json = dict[str, Any]


def used(us: float, share: float, cores: float = 0.3, waited: float = 0.0) -> Json:
    return {
        "us_per_span": us,
        "share": share,
        "cores": cores,
        "system_cores": 0.1,
        "waited_share": waited,
    }


def middle(value: float) -> Json:
    return {"median": value, "min": value, "max": value, "repeats": 1}


def load(rate: float = 500_000, errors: float = 0.0, us: float = 3.0, p99: float = 10.0) -> Json:
    row = {
        "summary": {
            "spans_per_second": middle(rate),
            "error_rate": middle(errors),
            "cpu_us_per_span": middle(us),
            "generator_cores": middle(0.1),
            "service_cores": middle(1.2),
            "rss_mb": middle(500),
        },
        "latency_ms": {"p99": middle(p99)},
        "threads": {
            "trio": used(2.0, 0.5, cores=0.9, waited=0.31),
            "ingest": used(1.0, 0.25, waited=0.05),
        },
    }
    return {
        "rows": {"100": row, "512": deepcopy(row)},
        "problems": [],
        "options": {"connections": 8},
        "machine": {"cores": 2},
    }


def called(p50: float, p99: float, items: int = 1, wall: float | None = None) -> Json:
    """A benchmark's figures in microseconds."""
    mean = wall or p50
    return {
        "items": items,
        "p50_us": p50,
        "p99_us": p99,
        "wall_us": middle(mean),
        "cpu_us": middle(mean / 2),
        "items_per_second": round(items / mean * 1e6),
    }


def soak(secs: float = 300, rate: float = 49_900, ms: float = 9.9, **ratio: float) -> Json:
    ratios = {"spans_per_second": 1.0, "cpu_us_per_span": 1.0, "p99_ms": 1.0, "rss_mb": 1.0} | ratio
    part = {"spans_per_second": 50_000, "cpu_us_per_span": 5.0, "p99_ms": 20.0, "rss_mb": 500.0}
    good = {k: r >= 0.9 if k == "spans_per_second" else r <= 1.1 for k, r in ratios.items()}
    return {
        "options": {"secs": secs, "rate": 50_000},
        "machine": {"load_average_before": 0.5, "load_average_after": 1.5},
        "run": {"spans_per_second": rate, "threads": {"trio": used(2.0, 0.5, waited=0.4)}},
        "queueing_ms": {"span-ingestion": ms, "projection": 900.0},
        "slices": [part, part],
        "judged": {"ratio": ratios, "good": good},
        "problems": [],
    }


def relations(ratio: float = 1.0, mb: float = 0.1) -> Json:
    lengths = [{"spans": 10, "peak_mb": 0.2}, {"spans": 50_000, "peak_mb": 5.0}]
    return {
        "service": {"ratio": middle(ratio), "relational_us": middle(3.0)},
        "spans_max": 50_000,
        "trace_length": [*lengths, {"spans": 1_000_000, "peak_mb": mb}],
    }


def verdict(runs: floors.Runs, what: str) -> tuple[str, str]:
    """A floor's verdict and its hint."""
    (found,) = [row for row in floors.rows(runs) if row[1] == what]
    return found[4], found[5]


CANDIDATES = "20 of 100 rules relate spans, one trace in ten a candidate"
TEN_TENANTS = "10 tenants, 100 rules, 60 s, 100 spans a request"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (load(100_000), REACHED),
        (load(99_999), MISSED),
        (load(100_000, errors=0.000_9), REACHED),
        (load(100_000, errors=0.001), MISSED),
        (load() | {"problems": ["accepted 2 spans but evaluated 1"]}, MISSED),
    ],
)
def test_rates_and_errors_of_a_load(given: Json, expected: str) -> None:
    assert verdict({"load-tenants": given}, TEN_TENANTS)[0] == expected


@pytest.mark.parametrize(
    ("run", "given", "what", "expected"),
    [
        ("load", load(us=3.99), "CPU a span, 100 a request", REACHED),
        ("load", load(us=4.01), "CPU a span, 100 a request", MISSED),
        ("load", load(p99=49.9), "p99 of a request, 512 a request", REACHED),
        ("load", load(p99=50.0), "p99 of a request, 512 a request", MISSED),
        ("load-500", load(99_000), "500 tenants writing at once, 50 rules each", MISSED),
        ("soak", soak(), "soak", REACHED),
        ("soak", soak(secs=299), "soak", MISSED),
        ("soak", soak(rate=49_000), "soak", MISSED),
        ("soak", soak() | {"problems": ["lost"]}, "soak", MISSED),
        ("soak", soak(ms=9.9), "in a channel on average, work included", REACHED),
        ("soak", soak(ms=10.0), "in a channel on average, work included", MISSED),
        ("soak", soak(rss_mb=1.11), "soak, last minute ÷ first: RSS", MISSED),
        ("soak", soak(rss_mb=1.09), "soak, last minute ÷ first: RSS", REACHED),
        ("relations", relations(ratio=1.5), CANDIDATES, REACHED),
        ("relations", relations(ratio=1.51), CANDIDATES, MISSED),
        ("relations", relations(mb=3.0), "judging a candidate of any length", REACHED),
        ("relations", relations(mb=9.0), "judging a candidate of any length", MISSED),
    ],
)
def test_edges_of_floors(run: str, given: Json, what: str, expected: str) -> None:
    assert verdict({run: given}, what)[0] == expected


@pytest.mark.parametrize(
    ("group", "name", "given", "what", "expected"),
    [
        ("duckdb", "signals 1000", called(20_000, 9e9, 1000), "signals", REACHED),
        ("duckdb", "signals 1000", called(20_100, 1, 1000), "signals", MISSED),
        ("caches", "key, hit", called(2, 999), "key, hit", REACHED),
        ("caches", "key, hit", called(2, 1000), "key, hit", MISSED),
        ("fallback", "files 128", called(300, 10_001), "fallback", MISSED),
    ],
)
def test_edges_of_benchmarks(group: str, name: str, given: Json, what: str, expected: str) -> None:
    machine = {"load_average_before": 3.0}
    runs = {"bench": {group: {name: given}, "machine": machine}}
    found = [r for r in floors.rows(runs) if what in r[1] and r[4] != NOT_RUN]
    assert [row[4] for row in found] == [expected]
    assert bool(found[0][5]) == (expected == MISSED)


def test_a_floor_without_a_run_names_its_command() -> None:
    rows = list(floors.rows({}))
    assert len(rows) == len(floors.FLOORS)
    assert {row[4] for row in rows} == {NOT_RUN}
    assert {row[3] for row in rows} >= {
        "`make load`",
        "`make soak`",
        "`make bench`",
        "`make curves`",
    }


def test_a_reached_floor_has_no_hint() -> None:
    assert verdict({"load": load()}, "100 spans a request") == (REACHED, "")


def test_a_missed_load_names_threads_functions_and_waits() -> None:
    functions = [
        {"thread": "trio", "function": "send", "file": "a.py", "self": 0.2, "total": 0.2},
        {"thread": "ingest", "function": "scan", "file": "b.py", "self": 0.1, "total": 0.3},
    ]
    profile = {"options": {"spans": 100}, "functions": functions}
    runs = {"load": load(150_000) | {"problems": ["lost 3"]}, "flamegraph": profile}
    assert verdict(runs, "100 spans a request")[1] == (
        "lost 3; CPU by thread, µs a span: trio 2.0 (50%), ingest 1.0 (25%); "
        "functions: send (trio) 20%, scan (ingest) 10%; cores of one thread: trio 0.90; "
        "time waiting for a core: trio 31%"
    )
    # The functions were sampled at another size of request.
    assert "functions" not in verdict(runs, "512 spans a request")[1]


def test_a_slow_answer_names_the_cores_and_waiting_threads() -> None:
    said = verdict({"load": load(p99=80)}, "p99 of a request, 100 a request")[1]
    assert said == (
        "8 connections, service 1.20 and generator 0.10 of 2 cores; "
        "time waiting for a core: trio 31%"
    )


@pytest.mark.parametrize(
    ("bare_p99", "said"),
    [
        (35_800, "takes 50% of the p50 (4.0 ms) and misses the floor too (p99 35.8 ms): server"),
        (4_900, "takes 50% of the p50 (4.0 ms); the adapter takes the rest"),
    ],
)
def test_the_ledger_is_compared_with_its_bare_client(bare_p99: float, said: str) -> None:
    ledger = {
        "tigerbeetle 128": called(8000, 25_000),
        "tigerbeetle 128, 20 a second": called(8000, 19_700),
        "tigerbeetle, bare client 128, 20 a second": called(4000, bare_p99),
    }
    found, hint = verdict({"bench": {"ledger": ledger}}, "ledger: TigerBeetle, batch of 128")
    assert found == MISSED
    assert said in hint


def test_a_slow_tail_is_distinguished_from_a_slow_median() -> None:
    machine = {"load_average_before": 3.0}
    caches = {"key, hit": called(2, 5000), "rules, hit": called(1500, 5000)}
    runs = {"bench": {"caches": caches, "machine": machine}}
    assert verdict(runs, "cache key, hit")[1].startswith("a tail: p50 is 0% of the limit")
    assert verdict(runs, "cache rules, hit")[1] == "not a tail: p50 1.50 ms"


def test_curves_name_what_grew() -> None:
    def point(x: int, path: float, fold: float, close: float) -> Json:
        ratio = middle(path)
        return {"x": x, "path_us": path, "fold_us": fold, "close_us": close, "ratio": ratio}

    rules = {"points": [point(10, 1.0, 0.3, 0.4), point(1000, 1.5, 0.7, 0.44)]}
    runs = {"curves": {"curves": {"rules": rules}}}
    grew = "from 10 to 1,000, µs a span: fold +0.40, decode +0.06, close and decide +0.04"
    assert verdict(runs, "CPU a span is flat over rules of a tenant") == (MISSED, grew)


def test_the_curve_of_tenants_names_threads_that_grew() -> None:
    def point(x: int, path: float, end: float, **threads: float) -> Json:
        shares = {name: used(us, 0.1) for name, us in threads.items()}
        given = {"path_us": path, "to_the_end_us": end, "ratio": middle(path)}
        return {"x": x, **given, "threads": shares, "threads_to_the_end": shares}

    points = [
        point(1, 3.0, 4.0, trio=2.0),
        point(500, 6.0, 9.0, trio=2.5, duckdb=2.5),
        point(1, 3, 4),
    ]
    runs = {"curves": {"curves": {"tenants": {"points": points}}}}
    grew = "from 1 to 500, µs a span: duckdb +2.50, trio +0.50"
    for what in ("tenants, while the load runs", "tenants, until all is stored"):
        assert verdict(runs, f"CPU a span is flat over {what}") == (MISSED, grew)


def test_runs_without_evidence_have_no_hint() -> None:
    """A run of an older version still gets a verdict."""
    old = load(50_000)
    for row in old["rows"].values():
        del row["threads"]
    assert verdict({"load": old}, "100 spans a request") == (MISSED, "")
    assert hints.said("words", {}) == "words"


def test_hints_of_the_other_runs() -> None:
    failed = soak(p99_ms=2.0)
    assert verdict({"soak": failed}, "soak, last minute ÷ first: p99 of a request") == (
        MISSED,
        "time waiting for a core: trio 40%; load average of the machine 0.5 before, 1.5 after",
    )
    grown = soak(rss_mb=1.2)
    grown["slices"] = [{"rss_mb": 500.0}, {"rss_mb": 580.4}, {"rss_mb": 600.0}]
    _, words = verdict({"soak": grown}, "soak, last minute ÷ first: RSS")
    assert words == "from slice to slice +80, +20 MB"
    row = {"taken": 1.0, "offered": 2.0, "refusals": 3}
    over = {"rows": {"twice that": row}, "accepted": 2, "evaluated": 1, "problems": ["lost 1"]}
    assert verdict({"overload": over}, "twice what it takes") == (MISSED, "lost 1")
    grown = {"growth_mb": 120.0, "growth_mb_by_step": [10.0, 60.0, 90.0, 120.0], "floor_mb": 100}
    memory = {"cases": {"1000 create/send/delete cycles of a tenant": grown}}
    assert verdict({"memory": memory}, "1000 create/delete cycles of a tenant") == (
        MISSED,
        "+30.0 MB of it in the second half of the cycles",
    )
    stats = {"hitRate": 0.69, "hitCount": 690, "missCount": 310, "evictionCount": 5}
    cachehits = {"caches": {"traceMetadata": stats}, "options": {"secs": 60.0}}
    assert verdict({"cachehits": cachehits}, "hit rate: trace metadata") == (
        MISSED,
        "310 misses in 1,000 look-ups, 5 evictions in 60 s, starting with an empty cache",
    )
    answers = {"traces, page of 1000": {"ms": middle(140)}, "one trace": {"ms": middle(3)}}
    slow = {"answers": answers, "slower_than_100_ms": ["traces, page of 1000"], "traces": 10}
    assert verdict({"queries": slow}, "pages of signals and traces") == (
        MISSED,
        "traces, page of 1000 140 ms",
    )
