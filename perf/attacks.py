"""Attacks on what tenants share: what a quiet tenant notices of each.

``python -m perf.attacks`` starts the service for each attack. A quiet tenant sends ten small
requests a second; its requests and the time to its signals are measured alone, and then beside the
attack at its full size. The ratios count, because other work on the machine affects both. No
request of the quiet tenant may fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import threading
from typing import Any

import httpx

from perf.lib.attackers import ATTACKS, Attack
from perf.lib.quiet_tenant import RULE, TENANT, QuietTenant
from perf.lib.target import Service, service
from perf.report import output

GOAL = 2.0
"""The quiet tenant's p99 beside an attack ÷ alone."""
SMALL = 0.05
"""Seconds; a p99 below this counts as this, because it is noise."""
BEGIN_SECONDS, END_SECONDS = 120.0, 90.0
FILES = {"tenant names": 1024}

Json = dict[str, Any]


def measure(name: str, seconds: float, size: float) -> Json:
    """The quiet tenant's figures alone and beside an attack."""
    with service(rules=10, files=FILES.get(name)) as target:
        save_rule(target)
        with QuietTenant(target.ingest, target.api) as quiet:
            quiet.measure(2)
            before = target.rss()
            alone = quiet.measure(seconds)
            beside, answers = attacked(target, quiet, name, seconds, size)
            memory = target.rss() - before
    return {
        "alone": alone,
        "beside": beside,
        "request_ratio": ratio(alone["p99"], beside["p99"]),
        "signal_ratio": ratio(alone["signal_p99"], beside["signal_p99"]),
        "rss_growth_mb": round(memory / 1e6, 1),
        "answers": answers,
    }


def save_rule(target: Service) -> None:
    """Save the quiet tenant's rule."""
    url, headers = f"{target.api}/api/v1/rules/quick", {"x-scope-orgid": TENANT}
    httpx.put(url, json=RULE, headers=headers, trust_env=False).raise_for_status()


def attacked(
    target: Service, quiet: QuietTenant, name: str, seconds: float, size: float
) -> tuple[Json, Json]:
    """The quiet tenant's figures beside an attack, and the answers to the attack by status."""
    attack = Attack(target, size)
    thread = threading.Thread(target=ATTACKS[name], args=(attack,), daemon=True)
    thread.start()
    try:
        if not attack.begun.wait(BEGIN_SECONDS):
            raise RuntimeError(f"{name}: the attack did not begin")
        return quiet.measure(seconds), {str(k): n for k, n in sorted(attack.answers.items())}
    finally:
        attack.over.set()
        thread.join(END_SECONDS)


def ratio(alone: float, beside: float) -> float:
    """How many times as long it takes beside the attack."""
    return round(max(SMALL, beside) / max(SMALL, alone), 2)


def problems(name: str, found: Json) -> list[str]:
    """What must not happen at any load of the machine."""
    failed = found["beside"]["failed"]
    lost = [] if found["beside"]["signals"] else [f"{name}: no signal arrived"]
    return [f"{name}: {failed} requests of the quiet tenant failed"] * bool(failed) + lost


def show(facts: Json, rows: dict[str, Json], seconds: float) -> str:
    """The report as text."""
    head = ["attack", "p99 alone, ms", "beside, ms", "×", "signal p99 alone, ms", "beside, ms"]
    head += ["×", "slowest query, ms", "failed", "MB more"]

    def ms(value: float) -> str:
        return f"{1000 * value:,.0f}"

    body = [
        [
            name,
            ms(row["alone"]["p99"]),
            ms(row["beside"]["p99"]),
            row["request_ratio"],
            ms(row["alone"]["signal_p99"]),
            ms(row["beside"]["signal_p99"]),
            row["signal_ratio"],
            ms(row["beside"]["query_max"]),
            row["beside"]["failed"],
            f"{row['rss_growth_mb']:,.0f}",
        ]
        for name, row in rows.items()
    ]
    return "\n".join(
        [
            f"{output.describe(facts)}.",
            f"A quiet tenant's ten requests a second for {seconds:g} s alone and {seconds:g} s "
            "beside each attack, from the request until its answer and until its signal. Goal: "
            f"at most {GOAL:g} ×; values below {ms(SMALL)} ms count as {ms(SMALL)} ms in the "
            "ratios. The attackers share the cores.",
            "",
            output.table(head, body),
        ]
    )


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--secs", type=float, default=15, help="of each measurement")
    parser.add_argument("--size", type=float, default=1.0, help="fraction of the full size")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="only attacks whose name matches this regex"
    )
    options = parser.parse_args(given)
    options.chosen = [name for name in ATTACKS if re.search(options.only, name)]
    if not options.chosen:
        parser.error(f"no attack matches {options.only!r}; they are: {'; '.join(ATTACKS)}")
    return options


def main(given: list[str] | None = None) -> None:
    options = parse(given)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the attackers' connections
    facts = output.machine()
    rows = {}
    for name in options.chosen:
        rows[name] = measure(name, options.secs, options.size)
        print(f"  {name}: {json.dumps(rows[name])}", file=sys.stderr, flush=True)
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    text = show(facts, rows, options.secs)
    print(text)
    found = [problem for name, row in rows.items() for problem in problems(name, row)]
    values = {"machine": facts, "secs": options.secs, "size": options.size, "rows": rows}
    output.say_saved("attacks", {**values, "problems": found}, text)
    if found:
        sys.exit("\n".join(["FAILED:", *found]))


if __name__ == "__main__":
    main()
