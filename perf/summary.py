"""perf/REPORT.md, from the JSON of the last runs in perf/out.

``python -m perf.summary`` writes it anew; what was not run is said to be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf import report
from perf.report import shown, table

REPORT = Path(__file__).parent / "REPORT.md"
PATH_FLAT = 1.2

# Of the curves that were not flat: what profiles and trials of 2026-11-23 showed.
WHY = {
    "trace_length": "not looked into; the curve was flat then (docs/decisions/0012-flat-fold.md).",
    "open_traces": "not looked into; the curve was flat then (docs/decisions/0012-flat-fold.md).",
    "rules": "not looked into; the curve was flat then.",
    "tenants": "work that is per tenant and not per span: commits of DuckDB for each tenant that "
    "closed traces (most of it), a sync of each log each second, the definitions of all rules in "
    "each checkpoint, a look at all rule files each two seconds. New tenants cost a file of DuckDB "
    "each, which holds up the pipeline until they are made.",
}
MOST_WINDOW = 1_000_000  # bytes

Json = dict[str, Any]

LOADS = (
    ("load", "As fast as it goes, one tenant"),
    ("load-tenants", "Ten tenants, 60 s: the floor of requirement F"),
    ("load-gzip", "With gzip"),
    ("load-json", "OTLP JSON"),
    ("load-synced", "ack = synced"),
)


def _verdict(good: bool) -> str:
    return "reached" if good else "**missed**"


def _floors(
    loads: dict[str, Json], bench: Json | None, memory: Json | None, curves: Json | None
) -> Iterator[tuple[str, ...]]:
    for name, spans in (("load", 512), ("load", 100), ("load-tenants", 100)):
        row = loads.get(name, {}).get("rows", {}).get(str(spans))
        if row:
            rate = row["summary"]["spans_per_second"]["median"]
            errors = row["summary"]["error_rate"]["max"]
            what = f"{spans} spans a request" + (", 10 tenants" if name != "load" else "")
            good = rate >= 100_000 and errors < 0.001
            yield (
                f"spans/s over HTTP, {what}",
                "100,000, < 0.1 % errors",
                f"{rate:,.0f}, {errors:.2%} errors",
                _verdict(good),
            )
    if bench and "evaluation" in bench:
        p99 = bench["evaluation"]["batch 100"]["p99_us"] / 1000
        yield (
            "evaluation of 100 spans, 100 rules, p99",
            "< 100 ms",
            f"{p99:.2f} ms",
            _verdict(p99 < 100),
        )
    if bench and "end_to_end" in bench:
        for key, what in (("ledger_ms", "in the ledger"), ("api_ms", "in GET /api/v1/signals")):
            e = bench["end_to_end"][key]
            reached = f"p50 {e['p50']:.0f}, p99 {e['p99']:.0f} ms"
            yield (
                f"last needed span to signal {what}",
                "< 500 ms",
                reached,
                _verdict(e["p99"] < 500),
            )
    if bench and "duckdb" in bench:
        for what in ("signals", "traces"):
            r = bench["duckdb"][f"{what} 1000"]
            by_cpu = 1e6 * r["items"] / r["cpu_us"]["median"]
            rate = r["items_per_second"]
            yield (
                f"DuckDB, {what}, 1000 a transaction",
                "50,000 rows/s",
                f"{rate:,}; {by_cpu:,.0f} by CPU time",
                _verdict(rate >= 50_000),
            )
    if bench and "caches" in bench:
        for name, values in bench["caches"].items():
            floor = 1000 if "hit" in name else 1e5
            yield (
                f"cache: {name}",
                f"< {floor / 1000:.0f} ms",
                f"{values['p99_us'] / 1000:.3f} ms p99",
                _verdict(values["p99_us"] < floor),
            )
    if memory:
        for name, values in memory["cases"].items():
            if values["floor_mb"] is not None:
                grown = values["growth_mb"]
                yield (
                    f"memory: {name}",
                    f"< {values['floor_mb']} MB",
                    f"{grown} MB",
                    _verdict(grown < values["floor_mb"]),
                )
    if curves:
        most = max(
            p["memory"]["bytes_per_trace"] for p in curves["curves"]["trace_length"]["points"]
        )
        yield (
            "memory of an open trace of any length",
            "< 1 MB",
            f"{most / 1000:.1f} kB",
            _verdict(most < MOST_WINDOW),
        )


def _curve(name: str, curve: Json) -> Iterator[str]:
    points = curve["points"]
    growth = max(p["ratio"]["median"] for p in points) / points[0]["ratio"]["median"]
    flat = growth <= PATH_FLAT
    picture = name.replace("_", "-")
    yield f"### {curve['title']}"
    yield ""
    yield f"![{curve['title']}](../docs/perf/{picture}.svg)"
    yield ""
    head = [curve["unit"], "path ÷ reference", "path, µs a span"]
    folds = "fold_ratio" in points[0]
    memory = "memory" in points[0]
    head += ["fold ÷ reference", "fold, µs a span"] * folds + ["bytes a trace"] * memory
    if name == "rules":
        head.append("compiling, ms")
    if name == "tenants":
        head += ["spans/s", "p99, ms", "RSS, MB", "new tenants: µs a span", "spans/s"]
    rows = []
    for p in points:
        row = [f"{p['x']:,}", shown(p["ratio"]), f"{p['path_us']:.3f}"]
        if folds:
            row += [shown(p["fold_ratio"]), f"{p['fold_us']:.3f}"]
        if memory:
            row.append(f"{p['memory']['bytes_per_trace']:,}")
        if name == "rules":
            row.append(f"{p['compile_ms']:.1f}")
        if name == "tenants":
            row += [f"{p['spans_per_second']:,}", f"{p['p99_ms']:.1f}", f"{p['rss_mb']:,}"]
            row += [f"{p['cold_us']:.2f}", f"{p['cold_spans_per_second']:,}"]
        rows.append(row)
    yield table(head, rows)
    yield ""
    said = "Flat within 20 %" if flat else "**Not flat within 20 %**"
    yield f"{said}: greatest ÷ first {growth:.2f}."
    if not flat:
        yield ""
        yield f"Why: {WHY[name]}"
    if memory:
        yield ""
        yield f"![Memory](../docs/perf/{picture}-memory.svg)"
    yield ""


def _curves(curves: Json) -> Iterator[str]:
    yield "## Curves"
    yield ""
    yield f"{report.describe(curves['machine'])}."
    yield ""
    yield (
        "*Path* is decoding, folding, closing, deciding and the rows of the trace index, in one "
        "thread without HTTP, log and stores (tenants: the whole service over HTTP). The reference "
        "is measured in turns with each point: traces of 10 spans, 1000 open, 100 rules: "
        f"{curves['reference_us']} µs a span, of which the fold {curves['reference_fold_us']} µs. "
        f"Payload: {curves['payload']}."
    )
    yield ""
    for name, curve in curves["curves"].items():
        yield from _curve(name, curve)
    many = curves["many_long_traces"]
    yield (
        f"{many['traces']} traces of {many['spans_per_trace']:,} spans at once, interleaved: "
        f"{many['path_us']} µs a span ({many['ratio']} of the reference), the fold "
        f"{many['fold_us']} µs, by tenths of the run {many['fold_us_by_tenth']}; "
        f"{many['bytes_per_trace']:,} bytes a trace, resident memory grew by "
        f"{many['rss_growth_mb']} MB."
    )
    yield ""


def main() -> None:
    found = {name: report.saved(name) for name, _ in LOADS}
    loads = {name: values for name, values in found.items() if values}
    bench, memory, curves = (report.saved(name) for name in ("bench", "memory", "curves"))
    lines = [
        "# Performance",
        "",
        "Made by `python -m perf.summary` from the JSON of the last runs (`make load`, `bench`, "
        "`memory`, `curves`). Figures of different runs do not compare; ratios within one do.",
        "",
        "## Floors",
        "",
        table(["", "floor", "reached", ""], list(_floors(loads, bench, memory, curves))),
        "",
    ]
    if curves:
        lines += _curves(curves)
    else:
        lines += ["## Curves", "", "Not run: `make curves`.", ""]
    titles = dict(LOADS)
    for name in titles:
        text = report.OUT / f"{name}.md"
        if name in loads and text.exists():
            lines += [f"## Load: {titles[name].lower()}", "", text.read_text()]
            problems = loads[name]["problems"]
            lines += [
                f"Checks failed: {'; '.join(problems)}." if problems else "All checks held.",
                "",
            ]
    for name, title in (("bench", "Benchmarks"), ("memory", "Memory")):
        text = report.OUT / f"{name}.md"
        said = text.read_text() if text.exists() else f"Not run: `make {name}`.\n"
        lines += [f"## {title}", "", said]
    REPORT.write_text("\n".join(lines).rstrip() + "\n")
    print(REPORT.relative_to(report.ROOT))


if __name__ == "__main__":
    main()
