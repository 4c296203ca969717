"""Attacks on what tenants share: what a quiet tenant notices of each.

``python -m perf.attacks`` starts the service for each attack. A quiet tenant sends ten small
requests a second; its requests and the time to its signals are measured alone, then beside the
attack at its full size, and then beside the same generator at the same rate while it attacks a
server that does nothing. The ratios count, because other work on the machine affects all three;
the last one separates what the generator costs the quiet tenant, because both share the cores.
No request of the quiet tenant may fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import threading
import time
from typing import Any

import httpx

from perf.lib.attackers import ATTACKS, Attack
from perf.lib.quiet_tenant import RULE, TENANT, QuietTenant
from perf.lib.sink import Sink
from perf.lib.target import Service, service
from perf.report import output

GOAL = 2.0
"""The quiet tenant's p99 beside an attack ÷ alone."""
SMALL = 0.05
"""Seconds; a p99 below this counts as this, because it is noise."""
BEGIN_SECONDS, END_SECONDS, SETTLE_SECONDS = 120.0, 90.0, 60.0
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
            beside, attack = attacked(target, quiet, name, seconds, size)
            memory = target.rss() - before
            settle(target)
            control = beside_generator(attack, quiet, name, seconds)
    return {
        "alone": alone,
        "beside": beside,
        "control": control,
        "request_ratio": ratio(alone["p99"], beside["p99"]),
        "signal_ratio": ratio(alone["signal_p99"], beside["signal_p99"]),
        "request_control_ratio": ratio(control["p99"], beside["p99"]),
        "signal_control_ratio": ratio(control["signal_p99"], beside["signal_p99"]),
        "rss_growth_mb": round(memory / 1e6, 1),
        "acts_per_second": round(attack.acts / seconds, 1),
        "answers": answers_of(attack),
    }


def settle(target: Service) -> None:
    """Wait until the service has finished what the attack left behind, a minute at most."""
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end and not target.get("/api/admin/pipeline")["drained"]:
        time.sleep(0.5)


def answers_of(attack: Attack) -> Json:
    """The answers to an attack by status."""
    return {str(k): n for k, n in sorted(attack.answers.items())}


def save_rule(target: Service) -> None:
    """Save the quiet tenant's rule."""
    url, headers = f"{target.api}/api/v1/rules/quick", {"x-scope-orgid": TENANT}
    httpx.put(url, json=RULE, headers=headers, trust_env=False).raise_for_status()


def attacked(
    target: Service, quiet: QuietTenant, name: str, seconds: float, size: float
) -> tuple[Json, Attack]:
    """The quiet tenant's figures beside an attack, and the attack when it is over; it has counted
    only what it did meanwhile."""
    attack = Attack(target, size)
    return _beside(attack, quiet, name, seconds), attack


def beside_generator(attack: Attack, quiet: QuietTenant, name: str, seconds: float) -> Json:
    """The quiet tenant's figures beside the generator of an attack that is over, when it attacks a
    server that does nothing, as often as it attacked the service."""
    answers = sum(attack.answers.values())
    with Sink(answer_bytes=attack.received // max(1, answers)) as sink:
        again = Attack(sink, attack.size, pace=max(0.1, attack.acts / seconds))
        return _beside(again, quiet, name, seconds)


def _beside(attack: Attack, quiet: QuietTenant, name: str, seconds: float) -> Json:
    thread = threading.Thread(target=ATTACKS[name], args=(attack,), daemon=True)
    thread.start()
    try:
        if not attack.begun.wait(BEGIN_SECONDS):
            raise RuntimeError(f"{name}: the attack did not begin")
        acts, received, answers = attack.acts, attack.received, dict(attack.answers)
        found = quiet.measure(seconds)
        attack.acts -= acts
        attack.received -= received
        for status, number in answers.items():
            attack.answers[status] -= number
        return found
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
    head += ["×", "beside its generator, ms", "×", "slowest query, ms", "failed", "MB more"]

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
            f"{ms(row['control']['p99'])}, {ms(row['control']['signal_p99'])}",
            f"{row['request_control_ratio']}, {row['signal_control_ratio']}",
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
            "ratios. The attackers share the cores: “beside its generator” is beside the same "
            "requests to a server that does nothing (requests, signals).",
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
