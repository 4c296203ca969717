"""Load, kills and restarts, and a comparison of the final active signals with the oracle."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx

from betrace.service.signals import Kind, Signal
from betrace.service.storage.duck.store import DuckStore
from betrace.service.storage.ledger.sqlite import SqliteLedger
from tests.crash.clients import Clients
from tests.crash.victim import ServiceProcess, Victim
from tests.crash.workload import TENANTS, Active, Traces, write_rules

SETTLE_SECONDS = 60
MOMENTS = ("running", "running", "running", "starting", "stopping")


class Campaign:
    """One service, its data and its clients. Use it as a context manager."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        rate: float = 60.0,
        entry: tuple[str, ...] = ("-m", "betrace.service"),
        **settings: str,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_rules(directory / "rules")
        self.rng = random.Random(seed)
        self.victim = Victim(directory, entry, **settings)
        idle = float(self.victim.settings["traces__idle_seconds"])
        self.traces = Traces(random.Random(seed + 1), idle)
        self.clients = Clients([self.victim.address], self.traces, rate)
        self.accounts = Accounts(self.victim)
        self.kills: Counter[str] = Counter()

    def __enter__(self) -> Campaign:
        self.victim.start()
        self.victim.wait_ready()
        self.clients.start()
        self.accounts.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.accounts.stop()
        self.clients.abandon()
        self.victim.close()

    def kill(self, moment: str) -> None:
        """Kill the running service at a random time within the given phase, and restart it."""
        rng, victim = self.rng, self.victim
        time.sleep(rng.uniform(0.05, 3.0))
        if moment == "stopping":
            victim.terminate()
            time.sleep(rng.choice((rng.uniform(0, 0.1), rng.uniform(0, 1.5))))
        elif moment == "starting":
            victim.kill()
            victim.start()
            time.sleep(rng.uniform(0.2, 4.0))
        victim.kill()
        self.kills[moment] += 1
        victim.start()
        victim.wait_ready()

    def settle(self) -> Active:
        """End the load, wait for the expected active signals, stop the service, and return them."""
        self.clients.finish(SETTLE_SECONDS)
        expected = self.traces.active()
        end = time.monotonic() + SETTLE_SECONDS
        while self.shown() != expected and time.monotonic() < end:
            time.sleep(0.3)
        time.sleep(2 * self.traces.idle)  # time for signals that must not appear
        shown = self.shown()
        self.accounts.stop()
        assert self.victim.stop() == 0, self.victim.log()[-3000:]
        same(expected, shown, "active in the API")
        return expected

    def verify(self) -> None:
        """End the load and compare everything with the oracle."""
        expected = self.settle()
        same(expected, active(self.ledger()), "active in the ledger")
        self.verify_index()
        assert not self.accounts.wrong, self.accounts.wrong[:3]

    def ledger(self) -> list[Signal]:
        """Return all ledger entries of the stopped service, after checking that ids are unique."""
        ledger = SqliteLedger(self.victim.data / "ledger.sqlite")
        try:
            found = [signal for tenant in TENANTS for signal in _entries(ledger, tenant)]
        finally:
            ledger.close()
        twice = [key for key, n in Counter(signal.id for signal in found).items() if n > 1]
        assert not twice, twice
        return found

    def verify_index(self) -> None:
        """Every trace is in the index, with all of its spans."""
        by_tenant: dict[str, dict[str, int]] = {tenant: {} for tenant in TENANTS}
        for (tenant, trace_id), spans in self.traces.made.items():
            by_tenant[tenant][trace_id] = len(spans)
        with DuckStore(self.victim.data) as store:
            for tenant, traces in by_tenant.items():
                rows = store.find_traces(tenant, list(traces))
                missing = traces.keys() - rows.keys()
                assert not missing, f"{len(missing)} traces of {tenant} are not in the index"
                wrong = {
                    trace: (row.spans, traces[trace])
                    for trace, row in rows.items()
                    if row.spans != traces[trace]
                }
                assert not wrong, f"{tenant}: spans indexed and sent: {wrong}"

    def shown(self) -> Active:
        """Return the active signals of all pages of the API."""
        return shown(self.victim, TENANTS)


def shown(service: ServiceProcess, tenants: Iterable[str]) -> Active:
    """Return the active signals of all pages of a service's API."""
    found = []
    for tenant in tenants:
        cursor = ""
        while True:
            page = service.get(f"/api/v1/signals?limit=1000&status=active{cursor}", tenant)
            found += [(tenant, s["trace_id"], s["rule_id"]) for s in page["signals"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
    assert len(found) == len(set(found)), "a page repeats a signal"
    return frozenset(found)


class Accounts:
    """Checks continuously that the service accounts for every span."""

    def __init__(self, victim: Victim) -> None:
        self._victim = victim
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.samples = 0
        self.most_in_flight = 0
        self.most_dead = 0
        self.wrong: list[dict[str, Any]] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def _ask(self) -> None:
        while not self._stop.wait(0.05):
            try:
                now = self._victim.get("/api/performance/metrics")
            except (httpx.HTTPError, AssertionError, ValueError):
                continue
            self.samples += 1
            self.most_in_flight = max(self.most_in_flight, now["spansInFlight"])
            self.most_dead = max(self.most_dead, now["spansDeadLettered"])
            came = now["spansAccepted"] + now["spansReplayed"] + now["spansCarried"]
            gone = now["spansEvaluated"] + now["spansInFlight"]
            gone += now["spansDeadLettered"] + now["spansDiscarded"]
            if came != gone or now["spansInFlight"] < 0:
                self.wrong.append({k: v for k, v in now.items() if k.startswith("spans")})


def active(signals: Iterable[Signal]) -> Active:
    """Return the signals that were raised and not retracted."""
    keys: dict[Kind, set[tuple[str, str, str]]] = {Kind.RAISED: set(), Kind.RETRACTED: set()}
    for signal in signals:
        keys[signal.kind].add((signal.tenant, signal.trace_id, signal.rule_id))
    assert keys[Kind.RETRACTED] <= keys[Kind.RAISED], "retracted without having been raised"
    return frozenset(keys[Kind.RAISED] - keys[Kind.RETRACTED])


def same(expected: Active, found: Active, what: str) -> None:
    """Fail with the difference if the sets differ."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    assert not missing, f"{what}: {len(missing)} of {len(expected)} missing: {missing[:5]}"
    assert not extra, f"{what}: {len(extra)} unexpected: {extra[:5]}"


def run_kills(directory: Path, kills: int, seed: int, report: Callable[[str], None]) -> Campaign:
    """Run a campaign with ``kills`` kills and compare its final state with the oracle."""
    with Campaign(directory, seed) as campaign:
        moments = [MOMENTS[k % len(MOMENTS)] for k in range(kills)]
        campaign.rng.shuffle(moments)
        for number, moment in enumerate(moments, 1):
            campaign.kill(moment)
            report(f"kill {number} of {kills}, while {moment}")
        campaign.verify()
    return campaign


def _entries(ledger: SqliteLedger, tenant: str) -> list[Signal]:
    found: list[Signal] = []
    after = 0
    while page := ledger.entries(tenant, after):
        found += [signal for _, signal in page]
        after = page[-1][0]
    return found
