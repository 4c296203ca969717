"""Write perf/REPORT.md from the JSON of the last runs in perf/out.

``python -m perf.summary`` replaces it. A program that was not run is named as missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf.report import cluster_floors, floors, hints, output
from perf.report.output import shown, table

REPORT = (
    output.OUT / "REPORT.md" if os.environ.get("PERF_OUT") else Path(__file__).parent / "REPORT.md"
)
PATH_FLAT = 1.2

Json = dict[str, Any]

LOADS = (
    ("load", "Maximum rate, one tenant"),
    ("load-tenants", "Ten tenants for 60 s"),
    ("load-500", "500 tenants at once, 50 rules each"),
    ("load-gzip", "With gzip"),
    ("load-json", "OTLP JSON"),
    ("load-synced", "ack = synced"),
)


def _floors(runs: floors.Runs) -> Iterator[str]:
    rows = list(floors.rows(runs))
    yield table(floors.HEAD, [row[:-1] for row in rows])
    yield ""
    missed = [(topic, what, where) for topic, what, _, _, _, where in rows if where]
    if missed:
        yield "Where to look first for the missed floors, according to the runs:"
        yield ""
        yield from (f"- {topic}, {what}: {where}." for topic, what, where in missed)
        yield ""


def _cluster(runs: floors.Runs) -> Iterator[str]:
    yield "## Cluster"
    yield ""
    yield (
        "NATS servers, all nodes and the load generator share the machine. CPU is that of each "
        "process; times depend on how busy the machine is."
    )
    yield ""
    yield table(cluster_floors.HEAD, cluster_floors.rows(runs))
    yield ""
    for name in cluster_floors.RUNS:
        text = output.OUT / f"{name}.md"
        if name in runs and text.exists():
            yield text.read_text()


def _curve(name: str, curve: Json) -> Iterator[str]:
    points = curve["points"]
    growth = max(p["ratio"]["median"] for p in points) / points[0]["ratio"]["median"]
    flat = growth <= PATH_FLAT
    picture = name.replace("_", "-")
    yield f"### {curve['title']}"
    yield ""
    yield f"![{curve['title']}]({output.PICTURES_LINK}/{picture}.svg)"
    yield ""
    head = [curve["unit"], "path ÷ reference", "path, µs a span"]
    folds = "fold_ratio" in points[0]
    memory = "memory" in points[0]
    head += ["fold ÷ reference", "fold, µs a span"] * folds + ["bytes a trace"] * memory
    if name == "rules":
        head.append("compiling, ms")
    if name == "tenants":
        head += [
            "until all is stored, µs a span",
            "spans/s",
            "p99, ms",
            "RSS, MB",
            "new tenants: µs a span",
            "spans/s",
        ]
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
            row.append(f"{p['to_the_end_us']:.2f}" if "to_the_end_us" in p else "–")
            row += [f"{p['spans_per_second']:,}", f"{p['p99_ms']:.1f}", f"{p['rss_mb']:,}"]
            row += [f"{p['cold_us']:.2f}", f"{p['cold_spans_per_second']:,}"]
        rows.append(row)
    yield table(head, rows)
    yield ""
    said = "Flat within 20 %" if flat else "**Not flat within 20 %**"
    yield f"{said}: greatest ÷ first {growth:.2f}."
    if name == "tenants" and all("to_the_end_us" in p for p in points):
        ends = [p["to_the_end_us"] for p in points]
        yield ""
        yield (
            "That is CPU while the load runs. Rows of many tenants wait up to half a minute to be "
            "committed together. For CPU until all rows are stored, including the idle time, "
            f"greatest ÷ first is {max(ends) / ends[0]:.2f}."
        )
    grew = hints.said(lambda _: hints.growth(points), {})
    if not flat and grew:
        yield ""
        yield f"What grew {grew}."
    if memory:
        yield ""
        yield f"![Memory]({output.PICTURES_LINK}/{picture}-memory.svg)"
    yield ""


def _curves(curves: Json) -> Iterator[str]:
    yield "## Curves"
    yield ""
    yield f"{output.describe(curves['machine'])}."
    yield ""
    yield (
        "*Path* is decoding, folding, closing, deciding and building the trace index's rows, in "
        "one thread without HTTP, log and stores (for tenants: the whole service over HTTP). The "
        "reference, measured in turns with each point, has traces of 10 spans, 1000 open traces "
        "and 100 rules: "
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


TEXTS = (
    ("relations", "Relations", "relations"),
    ("beside", "Beside Rotel and bare HTTP", "beside"),
    ("soak", "Soak", "soak"),
    ("overload", "Overload", "overload"),
    ("attacks", "Attacks on what tenants share", "attacks"),
    ("bench", "Benchmarks", "bench"),
    ("memory", "Memory", "memory"),
    ("cachehits", "Hit rates of the caches", "cachehits"),
    ("queries", "Queries", "queries"),
    ("regress", "Regression gate", "regress"),
    ("flamegraph", "Functions", "flamegraph"),
    ("flamegraph-500", "Functions with 500 tenants", "report"),
)


def main(given: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(given)
    names = [name for name, _ in LOADS] + [name for name, _, _ in TEXTS] + ["curves"]
    names += cluster_floors.RUNS
    runs = {name: values for name in names if (values := output.saved(name))}
    lines = [
        "# Performance",
        "",
        "`make summary` writes this page from the JSON of the last runs; `make report` runs "
        "everything first. Compare ratios within a run, not absolute figures of different runs.",
        "",
        "## Floors",
        "",
        "Goals go beyond the floors; curves must be flat within 20 %.",
        "",
        *_floors(runs),
    ]
    if "curves" in runs:
        lines += _curves(runs["curves"])
    else:
        lines += ["## Curves", "", "Not run: `make curves`.", ""]
    for name, title in LOADS:
        text = output.OUT / f"{name}.md"
        if name in runs and text.exists():
            lines += [f"## Load: {title[0].lower()}{title[1:]}", "", text.read_text()]
            problems = runs[name]["problems"]
            lines += [
                f"Checks failed: {'; '.join(problems)}." if problems else "All checks held.",
                "",
            ]
    for name, title, target in TEXTS:
        text = output.OUT / f"{name}.md"
        said = text.read_text() if text.exists() else f"Not run: `make {target}`.\n"
        lines += [f"## {title}", "", said]
        if name == "soak" and name in runs:
            pictures = ("rate", "memory")
            lines += [
                f"![Soak: {each}]({output.PICTURES_LINK}/soak-{each}.svg)" for each in pictures
            ] + [""]
        if runs.get(name, {}).get("problems"):
            lines += [f"Checks failed: {'; '.join(runs[name]['problems'])}.", ""]
    lines += _cluster(runs)
    REPORT.write_text("\n".join(lines).rstrip() + "\n")
    print(os.path.relpath(REPORT, output.ROOT))


if __name__ == "__main__":
    main()
