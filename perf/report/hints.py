"""Where to look first for a missed floor, derived from the runs: threads and functions with the
most CPU, waits for a core, the bare client beside the adapter, what grew along a curve.

A hint reads the runs like a floor does. It raises KeyError or IndexError if they have no evidence;
then there is no hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from perf.lib import stacks

Json = dict[str, Any]
Runs = dict[str, Json]
Hint = Callable[[Runs], str]

MOST = 4  # threads named
FULL = 0.8  # cores of one thread; above, it is saturated
SCARCE = 0.1  # fraction of the time that a thread waits for a core


def said(hint: Hint | str, runs: Runs) -> str:
    """Return the hint's text, empty if the runs have no evidence."""
    if isinstance(hint, str):
        return hint
    try:
        return hint(runs)
    except (KeyError, IndexError, ValueError):
        return ""


def _by_thread(threads: Json) -> str:
    named = [
        f"{name} {used['us_per_span']:.1f} ({used['share']:.0%})"
        for name, used in list(threads.items())[:MOST]
    ]
    return f"CPU by thread, µs a span: {', '.join(named)}"


def _waits(threads: Json) -> str:
    waits = {name: used["waited_share"] for name, used in threads.items()}
    waiting = [f"{name} {w:.0%}" for name, w in list(waits.items())[:MOST] if w > SCARCE]
    return f"time waiting for a core: {', '.join(waiting)}" if waiting else ""


def _full(threads: Json) -> str:
    full = [f"{name} {u['cores']:.2f}" for name, u in threads.items() if u["cores"] > FULL]
    return f"cores of one thread: {', '.join(full)}" if full else ""


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def load(name: str, spans: int, profile: str = "") -> Hint:
    """Hint for a load: failed checks, threads by CPU, saturated threads, waits for a core, and the
    functions in ``profile``, a run of perf.flamegraph."""

    def hint(runs: Runs) -> str:
        values = runs[name]
        threads = values["rows"][str(spans)]["threads"]
        functions = ""
        if profile in runs and runs[profile]["options"]["spans"] == spans:
            functions = f"functions: {stacks.said(runs[profile])}"
        problems = "; ".join(values["problems"])
        return _joined(problems, _by_thread(threads), functions, _full(threads), _waits(threads))

    return hint


def waits(name: str, spans: int) -> Hint:
    """Hint for a load's latency: how busy the cores are, and which threads wait for one."""

    def hint(runs: Runs) -> str:
        row, options = runs[name]["rows"][str(spans)], runs[name]["options"]
        generator = row["summary"]["generator_cores"]["median"]
        service = row["summary"]["service_cores"]["median"]
        cores = runs[name]["machine"]["cores"]
        return _joined(
            f"{options['connections']} connections, service {service:.2f} and generator "
            f"{generator:.2f} of {cores} cores",
            _waits(row["threads"]),
        )

    return hint


def soak(runs: Runs) -> str:
    """Hint for the soak: waits for a core, and the machine's load."""
    values = runs["soak"]
    machine = values["machine"]
    return _joined(
        _waits(values["run"]["threads"]),
        f"load average of the machine {machine['load_average_before']} before, "
        f"{machine['load_average_after']} after",
    )


def soak_memory(runs: Runs) -> str:
    """Hint for the soak's memory: its growth in each slice."""
    sizes = [part["rss_mb"] for part in runs["soak"]["slices"]]
    grown = [f"{after - before:+.0f}" for before, after in pairwise(sizes)]
    return f"from slice to slice {', '.join(grown)} MB"


def queueing(runs: Runs) -> str:
    """Hint for the time in channels: what the stages' threads did."""
    return _joined(_by_thread(runs["soak"]["run"]["threads"]), soak(runs))


def ledgers(runs: Runs) -> tuple[Json, Json]:
    """Return the runs of the TigerBeetle adapter and the bare client at 20 batches of 128 a
    second."""
    found = runs["bench"]["ledger"]
    names = ("tigerbeetle", "tigerbeetle, bare client")
    ours, bare = (found[f"{name} 128, 20 a second"] for name in names)
    return ours, bare


def tigerbeetle(runs: Runs) -> str:
    """Hint for TigerBeetle: how much of the time the bare client takes alone."""
    ours, bare = ledgers(runs)
    part = bare["p50_us"] / ours["p50_us"]
    text = f"the bare client alone takes {part:.0%} of the p50 ({bare['p50_us'] / 1000:.1f} ms)"
    if bare["p99_us"] >= 5000:
        text += f" and misses the floor too (p99 {bare['p99_us'] / 1000:.1f} ms): server and disk"
    else:
        text += "; the adapter takes the rest: SqliteLedger.add_outgoing, a synced commit before it"
    return text


def tail(group: str, name: str, most_us: float) -> Hint:
    """Hint for a benchmark's p99: whether its median is good."""

    def hint(runs: Runs) -> str:
        found = runs["bench"][group][name]
        machine = runs["bench"]["machine"]
        if found["p50_us"] >= most_us:
            return f"not a tail: p50 {found['p50_us'] / 1000:.2f} ms"
        used = found["cpu_us"]["median"] / found["wall_us"]["median"]
        return (
            f"a tail: p50 is {found['p50_us'] / most_us:.0%} of the limit; {used:.0%} of the time "
            f"is CPU, the rest is waiting (disk, core); load average "
            f"{machine['load_average_before']} before"
        )

    return hint


def slow_benchmark(group: str, name: str) -> Hint:
    """Hint for a benchmark's rate: the CPU share of a call, and the spread of its rounds."""

    def hint(runs: Runs) -> str:
        found = runs["bench"][group][name]
        wall = found["wall_us"]
        return (
            f"{found['cpu_us']['median'] / wall['median']:.0%} of a call is CPU; its rounds took "
            f"{wall['min']:,.0f} to {wall['max']:,.0f} µs"
        )

    return hint


def queries(runs: Runs) -> str:
    """Hint for queries: the slow ones."""
    answers = runs["queries"]["answers"]
    slow = runs["queries"]["slower_than_100_ms"]
    return ", ".join(f"{name} {answers[name]['ms']['median']:.0f} ms" for name in slow)


def curve(name: str, key: str = "path_us", threads: str = "threads") -> Hint:
    """Hint for a curve: what grew from its first point to its greatest."""

    def hint(runs: Runs) -> str:
        return growth(runs["curves"]["curves"][name]["points"], key, threads)

    return hint


def growth(points: Sequence[Json], key: str = "path_us", threads: str = "threads") -> str:
    """Return what grew from a curve's first point to the one with the most CPU a span, greatest
    first: threads if a point is the whole service, otherwise fold, close and decide, decode."""
    first, worst = points[0], max(points, key=lambda p: float(p[key]))
    if "fold_us" in first:
        parts = {"fold": "fold_us", "close and decide": "close_us"}
        grew = {name: worst[part] - first[part] for name, part in parts.items()}
        grew["decode"] = worst["path_us"] - first["path_us"] - sum(grew.values())
    else:
        before, after = first[threads], worst[threads]
        grew = {name: _us(after, name) - _us(before, name) for name in before | after}
    order = sorted(grew.items(), key=lambda item: -item[1])[:MOST]
    said = ", ".join(f"{name} {us:+.2f}" for name, us in order if us >= 0.005)
    return f"from {first['x']:,} to {worst['x']:,}, µs a span: {said}"


def _us(threads: Json, name: str) -> float:
    return float(threads.get(name, {}).get("us_per_span", 0.0))


def cache(name: str) -> Hint:
    """Hint for a cache's hit rate: its misses and evictions."""

    def hint(runs: Runs) -> str:
        found, options = runs["cachehits"]["caches"][name], runs["cachehits"]["options"]
        looks = found["hitCount"] + found["missCount"]
        return (
            f"{found['missCount']:,} misses in {looks:,} look-ups, {found['evictionCount']:,} "
            f"evictions in {options['secs']:g} s, starting with an empty cache"
        )

    return hint


def memory(runs: Runs) -> str:
    """Hint for the cycles of tenants: whether memory still grows at the end."""
    (steps,) = [
        found["growth_mb_by_step"]
        for found in runs["memory"]["cases"].values()
        if "growth_mb_by_step" in found
    ]
    half = steps[len(steps) // 2]
    return f"{steps[-1] - half:+.1f} MB of it in the second half of the cycles"


def overload(runs: Runs) -> str:
    """Hint for the overload: the failed checks."""
    return "; ".join(runs["overload"]["problems"])
