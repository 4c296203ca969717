"""The whole service without listeners while parts of it fail: nothing is lost or counted twice, and
every span is accounted for."""

from __future__ import annotations

import time
from contextlib import ExitStack, asynccontextmanager
from functools import partial

import pytest
import trio

from betrace.channels import BreakerState, TransientError
from betrace.service.api.components import components
from betrace.service.app.builder import open_service
from betrace.service.config.load import load
from betrace.service.pipeline.letter_book import SPANS_STAGE
from betrace.service.pipeline.request import Done, Reply, Request
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.ledger.base import LedgerError
from tests.support.api_client import ApiClient
from tests.support.oracle import OracleSpan
from tests.support.strategies import encode

RULES = """\
rules:
  - id: always-b
    condition: |
      when { a }
      always { b }
"""


def body(*numbers, complete=True):
    """Traces of one span that break the rule."""
    return encode(
        [
            OracleSpan(
                "a",
                number.to_bytes(16, "big"),
                number.to_bytes(8, "big"),
                attributes={"trace.complete": True} if complete else {},
            )
            for number in numbers
        ]
    )


class Harness:
    def __init__(self, directory, **changes):
        rules = directory / "rules"
        for tenant in (".", "acme"):  # files in the folder itself are those of the default tenant
            (rules / tenant).mkdir(parents=True, exist_ok=True)
            (rules / tenant / "rules.yaml").write_text(RULES)
        self.settings = load(
            None,
            {
                "storage.path": str(directory / "data"),
                "rules.directory": str(rules),
                "ingest.address": "off",
                "api.address": "off",
                "metrics.address": "off",
                "redelivery.delay_seconds": 0.02,
                "redelivery.transient_retry_seconds": 0.3,
                "breakers.storage.open_seconds": 0.3,
                "breakers.storage.timeout_seconds": 60,
                "breakers.evaluation.open_seconds": 0.3,
                "breakers.evaluation.timeout_seconds": 60,
                "checkpoint.interval_seconds": 0.3,
                "checkpoint.max_interval_seconds": 0.3,
                "duckdb.flush_ms": 20,
                "traces.idle_seconds": 0.5,
                **changes,
            },
        )
        self.accepted = set()
        self.unbalanced = []
        self.samples = 0

    @asynccontextmanager
    async def running(self):
        with ExitStack() as stack:
            make = open_service(self.settings, stack)
            self.service = service = make()
            self.pipeline = service.pipeline
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                yield service
                service.stop()
                while service.state != "stopped":
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            service.close()

    async def _watch(self, _):
        """Check the accounts as often as possible."""
        while True:
            account = self.service.sources.account()
            self.samples += 1
            if account.balance or account.in_flight < 0:
                self.unbalanced.append(account)
            await trio.sleep(0)
            await trio.sleep(0.001)

    async def send(self, *numbers, tenant="default", **options):
        request = Request(
            tenant,
            "protobuf",
            "",
            body(*numbers, **options),
            time.time_ns(),
            len(numbers),
            Reply(),
        )
        assert await self.pipeline.requests.offer(request, 60)
        outcome = await request.reply.wait()
        assert isinstance(outcome, Done), outcome
        self.accepted.update((tenant, number) for number in numbers)

    def recorded(self, tenant="default"):
        """How often each trace has a signal in the ledger."""
        return [
            int(signal.trace_id, 16)
            for _, signal in self.service.ledger.entries(tenant, 0, 100_000)
        ]

    def projected(self, tenant="default"):
        found, _ = self.service.store.signals(tenant, limit=1000)
        return [int(each.signal.trace_id, 16) for each in found]

    async def until(self, condition):
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.02)

    def all_there(self, tenant="default"):
        wanted = sorted(number for owner, number in self.accepted if owner == tenant)
        return sorted(self.recorded(tenant)) == wanted and sorted(self.projected(tenant)) == wanted

    def check(self):
        assert self.samples > 10
        assert not self.unbalanced


def failing(owner, name, error):
    """Make a method fail until the returned function is called."""
    original = getattr(owner, name)
    state = {"broken": True, "calls": 0}

    def broken(*args, **kwargs):
        state["calls"] += 1
        if state["broken"]:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, broken)

    def heal():
        state["broken"] = False

    heal.calls = lambda: state["calls"]
    return heal


@pytest.mark.parametrize("error", [ValueError("a bug"), TransientError("busy")])
async def test_spans_that_cannot_be_folded_become_dead_letters_and_come_back(tmp_path, error):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        await harness.send(1, 2)
        await harness.until(harness.all_there)
        heal = failing(service.pipeline.open_traces, "fold", error)
        await harness.send(3, 4, 5)
        await harness.send(6, tenant="acme")
        await harness.until(lambda: service.sources.account().dead_lettered == 4)
        account = service.sources.account()
        assert (account.accepted, account.evaluated, account.in_flight) == (6, 2, 0)
        assert components(service.sources)["dead-letters"]["status"] == "degraded"
        if isinstance(error, TransientError):
            calls = heal.calls()
            await harness.until(lambda: heal.calls() > calls)  # they are retried automatically
            heal()
        else:
            heal()
            await trio.sleep(1)
            assert service.sources.account().dead_lettered == 4
            retried = await ApiClient(service).post("/api/admin/dead-letters/retry", 202)
            assert retried == {"retried": 2}
        await harness.until(lambda: harness.all_there() and harness.all_there("acme"))
        account = service.sources.account()
        assert (account.evaluated, account.dead_lettered, account.in_flight) == (6, 0, 0)
        await harness.until(lambda: not service.pipeline.letters._store.page())
    harness.check()


async def test_dead_letters_survive_a_restart(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        failing(service.pipeline.open_traces, "fold", ValueError("a bug"))
        await harness.send(1, 2)
        await harness.until(lambda: service.sources.account().dead_lettered == 2)
    harness.check()
    async with harness.running() as service:
        account = service.sources.account()
        assert (account.carried, account.dead_lettered, account.replayed) == (2, 2, 0)
        await ApiClient(service).post("/api/admin/dead-letters/retry", 202)
        await harness.until(harness.all_there)
        account = service.sources.account()
        assert (account.evaluated, account.dead_lettered, account.balance) == (2, 0, 0)
    harness.check()
    async with harness.running() as service:
        assert service.sources.account().carried == 0
        assert harness.all_there()


async def test_an_unavailable_ledger_delays_nothing(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        heal = failing(service.ledger, "record", LedgerError("it is away", transient=True))
        for number in range(1, 81):
            await harness.send(number)
        await harness.until(lambda: len(harness.projected()) == 80)  # durable in the files
        assert harness.recorded() == []
        found = components(service.sources)
        assert found["fallback-ledger"]["status"] == "degraded"
        heal()
        await harness.until(harness.all_there)
        await harness.until(lambda: not service.pipeline.fallbacks["ledger"].pending)
        assert components(service.sources)["fallback-ledger"]["status"] == "ok"
    harness.check()


async def test_an_unavailable_duckdb_delays_nothing(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        heal = failing(service.store, "write", StoreError("it is away", transient=True))
        for number in range(1, 41):
            await harness.send(number)
        await harness.until(lambda: len(harness.recorded()) == 40)
        await harness.until(lambda: service.pipeline.fallbacks["duckdb"].pending)
        heal()
        await harness.until(harness.all_there)
    harness.check()


async def test_fallback_files_are_written_back_after_a_restart(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        service.pipeline.breakers.ledger.force_open()
        service.pipeline.breakers.duckdb.force_open()
        await harness.send(*range(1, 21))
        await harness.until(
            lambda: all(each.pending for each in service.pipeline.fallbacks.values())
        )
    assert list((tmp_path / "data" / "fallback").glob("*/*.jsonl"))
    async with harness.running():
        await harness.send(21)
        await harness.until(harness.all_there)
        await harness.until(lambda: not list((tmp_path / "data" / "fallback").glob("*/*.jsonl")))
    harness.check()


async def test_refused_evaluation_recovers_by_itself(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        service.pipeline.breakers.evaluation.force_open()
        await harness.send(1, 2)
        await harness.send(3, tenant="acme")
        await harness.until(lambda: service.pipeline.letters.book.total == 2)
        assert service.sources.account().dead_lettered == 0  # the spans are folded
        shown = components(service.sources)["breaker-rule-evaluation"]
        assert shown == {"status": "degraded", "detail": "forced_open"}
        await ApiClient(service).post("/api/admin/breakers/rule-evaluation/reset")
        assert service.pipeline.breakers.evaluation.state is BreakerState.CLOSED
        await harness.until(lambda: harness.all_there() and harness.all_there("acme"))
        await harness.until(lambda: service.pipeline.letters.book.total == 0)
    harness.check()


async def test_operator_actions_are_in_the_audit_log(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        post = partial(ApiClient(service).post, x_operator="tests")
        found = await post("/api/admin/pipeline/drain?wait=60")
        assert (found["ingestion"], found["drained"]) == ("paused", True)
        assert (await post("/api/admin/pipeline/resume"))["ingestion"] == "open"
        assert (await post("/api/admin/pipeline/pause"))["ingestion"] == "paused"
        await post("/api/admin/breakers/ledger/trip")
        await post("/api/admin/fallback/replay", 202)
        await post("/api/admin/dead-letters/17/discard", 404)
    lines = (tmp_path / "data" / "audit.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert [line.split('"action":"')[1].split('"')[0] for line in lines] == [
        "pipeline.drain",
        "pipeline.resume",
        "pipeline.pause",
        "breaker.trip",
        "fallback.replay",
        "dead-letters.discard",
    ]
    assert all('"operator":"tests","client":"<local>"' in line for line in lines)


async def test_all_metrics_exist_from_the_start(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        service.pipeline.breakers.ledger.trip()
        text = (await service.tools.exposition.scrape()).decode()
    for sample in (
        'betrace_circuit_breaker_state{name="ledger",state="open"} 1.0',
        'betrace_circuit_breaker_state{name="ledger",state="closed"} 0.0',
        'betrace_circuit_breaker_calls_total{kind="failed",name="duckdb"} 0.0',
        'betrace_dead_letters{stage="rule-evaluation"} 0.0',
        'betrace_fallback_pending{store="ledger"} 0.0',
        "betrace_spans_dead_lettered 0.0",
        'betrace_fallback_write_latency_seconds_count{store="duckdb"} 0.0',
    ):
        assert sample in text
    assert SPANS_STAGE in text


async def test_operators_see_and_discard_dead_letters(tmp_path):
    harness = Harness(tmp_path)
    async with harness.running() as service:
        heal = failing(service.pipeline.open_traces, "fold", ValueError("a bug"))
        for number in (1, 2, 3):
            await harness.send(number)
            await harness.until(lambda n=number: service.sources.account().dead_lettered == n)
        client, path = ApiClient(service), "/api/admin/dead-letters"
        page = await client.get(f"{path}?stage={SPANS_STAGE}&tenant=default&limit=2")
        letters = page["deadLetters"]
        assert [letter["id"] for letter in letters] == ["1", "2"]
        assert letters[0]["next_retry"] is None
        assert letters[0]["last_failed"].endswith("Z")
        rest = await client.get(f"{path}?limit=2&cursor={page['next']}")
        assert ([letter["id"] for letter in rest["deadLetters"]], rest["next"]) == (["3"], None)
        assert len((await client.get(f"{path}/2"))["payload"]["positions"]) == 1
        await client.get(f"{path}/9", 404)
        assert (await client.get(f"{path}?tenant=other"))["deadLetters"] == []
        assert (await client.get(f"{path}?stage=projection"))["deadLetters"] == []
        assert await client.post(f"{path}/2/discard") == {"discarded": 1}
        account = service.sources.account()
        assert (account.dead_lettered, account.discarded) == (2, 1)
        heal()
        assert await client.post(f"{path}/1/retry", 202) == {"retried": 1}
        await harness.until(lambda: harness.recorded() == [1])
        service.pipeline.letters._store.close()
        assert "disk space" in (await client.post(f"{path}/3/discard", 503))["hint"]
        last = (tmp_path / "data" / "audit.jsonl").read_text().splitlines()[-1]
        assert '"failed":' in last
    harness.check()
