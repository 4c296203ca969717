"""Hit rates of the three caches under realistic use: ``python -m perf.cachehits``.

Authentication is on. Each tenant's exporters send traces with tokens that they renew. Users list
their tenant's signals, open some traces, and come back to them. Rules are edited, and some spans
arrive late. The warm-up runs as in production. Prints the rates beside their floors.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from betrace.service.tenancy.tokens import make_token, public_pem
from perf.generator import tenant_name
from perf.lib.target import service
from perf.report import output

FLOORS = {"ruleContainers": 0.8, "publicKeys": 0.9, "traceMetadata": 0.7}
EXPORTERS = 3  # of each tenant, each with its own token
TOKEN_SECONDS = 20.0  # after which an exporter renews it
SEND_SECONDS = 3.0  # between two requests of an exporter
THINK_SECONDS = 1.0  # of a user between two clicks
EDIT_SECONDS = 2.0  # between two edits of rules, of all tenants
BREACHES, LATE = 0.2, 0.05  # fractions of the traces

Json = dict[str, Any]


class Load:
    """Exporters, users and editors, against one service, for ``seconds``."""

    def __init__(self, ingest: str, api: str, operator: str, seconds: float) -> None:
        self._ingest, self._api = ingest, api
        self._operator = {"authorization": f"Bearer {operator}"}
        self._seconds = seconds
        self._keys: dict[str, Ed25519PrivateKey] = {}
        self.done: Counter[str] = Counter()
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(timeout=60, limits=limits, trust_env=False)

    async def run(self, tenants: int, users: int) -> Json:
        """Return the statistics of the caches at the end, by name."""
        async with self._client:
            for name in map(tenant_name, range(tenants)):
                await self._create(name)
            names = sorted(self._keys)
            with trio.move_on_after(self._seconds):
                async with trio.open_nursery() as nursery:
                    for name in names:
                        for _ in range(EXPORTERS):
                            nursery.start_soon(self._retrying, self._export, name)
                    for number in range(users):
                        nursery.start_soon(self._retrying, self._use, names[number % len(names)])
                    nursery.start_soon(self._retrying, self._edit, "")
            url = f"{self._api}/api/performance/cache-stats"
            found: Json = (await self._client.get(url, headers=self._operator)).json()
            return found

    async def _create(self, name: str) -> None:
        key = self._keys[name] = Ed25519PrivateKey.generate()
        body = {"tenant": name, "publicKey": public_pem(key)}
        answer = await self._client.post(
            f"{self._api}/api/admin/tenants", json=body, headers=self._operator
        )
        answer.raise_for_status()

    async def _retrying(self, work: Callable[[str], Awaitable[None]], tenant: str) -> None:
        await trio.sleep(random.uniform(0, SEND_SECONDS))
        while True:
            try:
                await work(tenant)
            except httpx.HTTPError as error:
                self.done[f"failed: {type(error).__name__}"] += 1
                await trio.sleep(1)

    def _token(self, tenant: str) -> Json:
        token = make_token(self._keys[tenant], tenant, time.time(), 600 + random.uniform(0, 60))
        return {"authorization": f"Bearer {token}"}

    async def _export(self, tenant: str) -> None:
        """Act as an exporter until it renews its token."""
        headers = {**self._token(tenant), "content-type": "application/x-protobuf"}
        end = trio.current_time() + TOKEN_SECONDS * random.uniform(0.5, 1.5)
        late = b""
        while trio.current_time() < end:
            trace = secrets.token_bytes(16)
            body = _trace(trace, random.random() < BREACHES) + (_span(late, 2) if late else b"")
            url = f"{self._ingest}/v1/traces"
            answer = await self._client.post(url, content=body, headers=headers)
            self.done["requests sent" if answer.is_success else f"sent: {answer.status_code}"] += 1
            late = trace if random.random() < LATE else b""
            await trio.sleep(SEND_SECONDS * random.uniform(0.5, 1.5))

    async def _use(self, tenant: str) -> None:
        """Act as a user who lists signals and opens some traces, some of them twice."""
        headers = self._token(tenant)
        listed = await self._get("/api/v1/signals?limit=20", headers)
        signals = [each["trace_id"] for each in listed.get("signals", [])] if listed else []
        newest = list(dict.fromkeys(signals[:10]))
        for trace in random.sample(newest, min(3, len(newest))):
            for _ in range(random.choice((1, 2, 3))):  # opens it, tries a rule on it, comes back
                await self._get(f"/api/v1/traces/{trace}", headers)
                self.done["traces opened"] += 1
                await trio.sleep(THINK_SECONDS * random.uniform(0.5, 1.5))
        await trio.sleep(THINK_SECONDS)

    async def _edit(self, _: str) -> None:
        tenant = random.choice(list(self._keys))
        rule = {"name": "Edited", "condition": f"count(step.s000) < {random.randint(10, 99)}"}
        url = f"{self._api}/api/v1/rules/edited"
        headers = self._token(tenant)
        answer = await self._client.put(url, json=rule, headers=headers)
        if answer.status_code == 428:
            await self._client.put(url, json=rule, headers={**headers, "if-match": "*"})
        self.done["rules edited"] += 1
        await trio.sleep(EDIT_SECONDS)

    async def _get(self, path: str, headers: Json) -> Json | None:
        answer = await self._client.get(self._api + path, headers=headers)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return dict(answer.json())


def _trace(trace: bytes, breach: bool) -> bytes:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "shop"
    spans = group.scope_spans.add().spans
    for number in range(5):
        span = spans.add(trace_id=trace, span_id=secrets.token_bytes(8), name=f"step.s{number:03d}")
        span.start_time_unix_nano = time.time_ns()
        span.end_time_unix_nano = span.start_time_unix_nano + 1000
        total = 2000.0 if breach and not number else 10.0
        span.attributes.add(key="order.total").value.double_value = total
    return bytes(request.SerializeToString())


def _span(trace: bytes, number: int) -> bytes:
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add()
    span.trace_id, span.span_id, span.name = trace, secrets.token_bytes(8), f"late.{number}"
    span.start_time_unix_nano = time.time_ns()
    span.end_time_unix_nano = span.start_time_unix_nano + 1000
    return bytes(request.SerializeToString())


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--rules", type=int, default=20, help="rules of each tenant")
    parser.add_argument("--secs", type=float, default=120)
    parser.add_argument("--idle", type=float, default=5, help="seconds after which a trace closes")
    options = parser.parse_args(given)
    facts = output.machine()
    operator = secrets.token_hex(16)
    settings = {"auth__enabled": "true", "auth__operator_token": operator}
    settings["traces__idle_seconds"] = str(options.idle)
    with service(rules=options.rules, tenants=options.tenants, settings=settings) as target:
        load = Load(target.ingest, target.api, operator, options.secs)
        stats = trio.run(load.run, options.tenants, options.users)
    rows = []
    for name, floor in FLOORS.items():
        values = stats[name]
        rate = values["hitRate"]
        loads = f"{values['loadSuccessCount']} of {values['averageLoadPenaltyMs']:.1f} ms"
        counts = f"{values['hitCount']} / {values['missCount']}"
        verdict = "reached" if rate >= floor else "MISSED"
        rows.append((name, f"{rate:.1%}", f"≥ {floor:.0%}", counts, loads, verdict))
    done = ", ".join(f"{number} {what}" for what, number in sorted(load.done.items()))
    head = ["cache", "hit rate", "floor", "hits / misses", "loads", ""]
    text = "\n".join(
        [
            f"Hit rates of the caches. {output.describe(facts)}.",
            f"{options.tenants} tenants with {options.rules} rules, {options.users} users, "
            f"the first {options.secs:g} s after the start of the service: {done}.",
            "",
            output.table(head, rows),
        ]
    )
    print(text)
    values = {"machine": facts, "options": vars(options), "caches": stats, "done": dict(load.done)}
    output.say_saved("cachehits", values, text)
    return 0 if all(row[-1] == "reached" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
