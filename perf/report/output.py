"""Common parts of reports: machine, versions and load; Markdown tables; JSON files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
OUT = Path(os.environ.get("PERF_OUT") or ROOT / "perf" / "out")
PICTURES = OUT if os.environ.get("PERF_OUT") else ROOT / "docs" / "perf"
PICTURES_LINK = "." if os.environ.get("PERF_OUT") else "../docs/perf"  # from the report
PACKAGES = ("numba", "numpy", "trio", "hypercorn", "httptools", "duckdb", "pyarrow", "isal")
BUSY = 0.6  # load average a core, before the run, above which figures are called disturbed

Json = dict[str, Any]


def machine() -> Json:
    """Return processor, cores, memory, system and versions."""
    name = platform.processor() or "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """Return the measured commit, with ``+`` if the service's files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", "service", "channels")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def describe(facts: Json) -> str:
    """Describe the machine in a line or two, for the head of a report."""
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    load, cores = facts["load_average_before"], facts["cores"] or 1
    busy = f"; machine busy: load average {load} before" if load > BUSY * cores else ""
    return (
        f"{facts['cpu']}, {cores} cores, {facts['memory_gb']} GB, {facts['system']}; Python "
        f"{facts['python']}, {versions}; commit {facts['commit']}, {facts['time']}{busy}"
    )


def describe_payload(payload: Json) -> str:
    """Describe the payload in a line."""
    kind = payload["encoding"] + (" with gzip" if payload["gzip"] else "")
    size = f"{payload['bytes_per_span']} bytes a span on the wire"
    if payload["bytes_per_span"] != payload["raw_bytes_per_span"]:
        size += f" ({payload['raw_bytes_per_span']} uncompressed)"
    return (
        f"{payload['spans']} spans a request, {payload['spans_per_trace']} a trace, {size}, about "
        f"{payload['attributes']} attributes a span, OTLP/HTTP {kind}, {payload['rules']} rules, "
        f"one span in ten of interest, {payload['breaches']:.1%} of traces break a rule"
    )


def spread(values: Sequence[float], digits: int = 2) -> Json:
    """Return median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "repeats": len(values),
    }


def shown(values: Mapping[str, Any], digits: int = 2) -> str:
    """Format a spread as ``median (min–max)``."""
    if values["repeats"] == 1:
        return f"{values['median']:,.{digits}f}"
    low, high = (f"{values[key]:,.{digits}f}" for key in ("min", "max"))
    return f"{values['median']:,.{digits}f} ({low}–{high})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def save(name: str, values: Json) -> Path:
    """Write ``perf/out/NAME.json``."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return path


def say_saved(name: str, values: Json, text: str) -> None:
    """Write the JSON and the report's text, and print the path."""
    path = save(name, values)
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\n{os.path.relpath(path, ROOT)}")


def saved(name: str) -> Json | None:
    """Return what :func:`save` wrote last, or None."""
    path = OUT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
