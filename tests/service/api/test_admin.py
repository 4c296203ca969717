"""What operators do, each action in the audit log before it is done."""

import json

import pytest
import trio

from betrace.service.storage.dead_letters import DeadLetterError
from betrace.service.tenancy import changes
from tests.support.api_client import ApiClient
from tests.support.inprocess import put_rule, running, settings

EXPORT = {"webhook": {"url": "http://127.0.0.1:9/"}}


def audit(service):
    """The records of the audit log."""
    path = service.settings.storage.path / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def actions(service):
    """The records without their times."""
    return [{k: v for k, v in record.items() if k != "time"} for record in audit(service)]


ME = {"operator": "operator", "client": "<local>"}


async def test_breakers_are_listed_with_those_of_exports(tmp_path):
    async with running(settings(tmp_path, export=EXPORT)) as service:
        answer = await ApiClient(service).get("/api/admin/breakers")
        names = [each["name"] for each in answer["breakers"]]
        assert names == ["rule-evaluation", "ledger", "duckdb", "export-webhook"]


@pytest.mark.parametrize(
    ("action", "state"),
    [
        ("trip", "open"),
        ("reset", "closed"),
        ("force-open", "forced_open"),
        ("disable", "disabled"),
    ],
)
async def test_actions_on_a_breaker(client, service, action, state):
    answer = await client.post(f"/api/admin/breakers/ledger/{action}")
    assert (answer["name"], answer["state"]) == ("ledger", state)
    assert str(service.pipeline.breakers["ledger"].state) == state
    expected = {**ME, "action": f"breaker.{action}", "breaker": "ledger", "before": "closed"}
    assert actions(service) == [expected]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/admin/breakers/leger/trip", 404, "did you mean ledger?"),
        ("/api/admin/breakers/ledger/explode", 400, "one of trip, reset, force-open, disable"),
        ("/api/admin/dead-letters/99/retry", 404, "retried already"),
        ("/api/admin/dead-letters/99/discard", 404, "retried already"),
        ("/api/admin/dead-letters/x/retry", 400, "an integer from 1"),
        ("/api/admin/dead-letters/0/discard", 400, "an integer from 1"),
        ("/api/admin/dead-letters/retry?tenant=Bad!", 400, "tenant name"),
        ("/api/admin/pipeline/drain?wait=61", 400, "from 0 to 60"),
        ("/api/performance/cache-invalidate/publicKey", 404, "did you mean publicKeys?"),
        ("/api/performance/cache-invalidate/publicKeys?tenantId=A%20B", 400, "tenant name"),
    ],
)
async def test_impossible_requests_get_a_hint(client, path, status, words):
    error = await client.post(path, status)
    assert words in error["hint"]


async def test_operators_may_give_their_name(client, service):
    async def ingestion():
        return (await client.get("/api/admin/pipeline"))["ingestion"]

    await client.post("/api/admin/pipeline/pause", x_operator="kim@example.org")
    assert await ingestion() == "paused"
    assert audit(service)[0]["operator"] == "kim@example.org"
    error = await client.post("/api/admin/pipeline/resume", 400, x_operator="a b")
    assert "X-Operator" in error["message"]
    assert await ingestion() == "paused"
    assert len(audit(service)) == 1


ACTIONS = [
    ("POST", "/api/admin/breakers/ledger/force-open", None),
    ("POST", "/api/admin/dead-letters/2/retry", None),
    ("POST", "/api/admin/dead-letters/retry", None),
    ("POST", "/api/admin/dead-letters/2/discard", None),
    ("POST", "/api/admin/fallback/replay", None),
    ("POST", "/api/admin/checkpoint", None),
    ("POST", "/api/performance/cache-invalidate/publicKeys", None),
    ("POST", "/api/admin/cache-warmup", None),
    ("POST", "/api/admin/pipeline/pause", None),
    ("POST", "/api/admin/pipeline/resume", None),
    ("POST", "/api/admin/pipeline/drain", None),
    ("POST", "/api/admin/tenants", {"tenant": "acme"}),
    ("PUT", "/api/admin/tenants/known/quota", {"spansPerSecond": 5}),
    ("DELETE", "/api/admin/tenants/known/keys/" + "k" * 43, None),
    ("DELETE", "/api/admin/tenants/known", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ACTIONS)
async def test_an_action_that_cannot_be_audited_is_not_done(
    client, service, monkeypatch, method, path, body
):
    """Nothing that changes something is called when the audit log cannot be written."""
    service.gate.directory.change("known", changes.create(None, None))
    (service.settings.storage.path / "audit.jsonl").mkdir()

    def forbidden(*_, **__):
        pytest.fail("acted without an audit record")

    pipeline = service.pipeline
    for owner, names in (
        (service.admission, ("pause", "resume")),
        (pipeline.breakers, ("act",)),
        (pipeline.letters, ("retry", "discard")),
        (service.recovery, ("save",)),
        (service.caches, ("invalidate", "warm_up")),
        (service.gate.directory, ("change", "begin_deletion")),
        *((fallback, ("write_back_now",)) for fallback in pipeline.fallbacks.values()),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, forbidden)
    error = await client.ask(method, path, 503, body)
    assert "audit log cannot be written" in error["message"]
    assert "free disk space" in error["hint"]


async def test_a_failed_action_is_audited_as_failed(client, service, monkeypatch):
    async def fails(*_, **__):
        raise DeadLetterError("the disk is full")

    monkeypatch.setattr(service.pipeline.letters, "retry", fails)
    error = await client.post("/api/admin/dead-letters/retry?stage=projection", 503)
    assert "the disk is full" in error["message"]
    target = {**ME, "action": "dead-letters.retry", "stage": "projection"}
    assert actions(service) == [target, {**target, "failed": "the disk is full"}]


async def test_reading_is_not_audited(client, service):
    for path in ("breakers", "dead-letters", "fallback", "checkpoint", "pipeline", "tenants"):
        await client.get(f"/api/admin/{path}")
    assert audit(service) == []


async def test_checkpoints(tmp_path, monkeypatch):
    path = "/api/admin/checkpoint"
    async with running(settings(tmp_path)) as service:
        client = ApiClient(service)
        assert (await client.post(path))["savedAt"] is not None

        async def fails():
            return False

        monkeypatch.setattr(service.recovery, "save", fails)
        assert "disk" in (await client.post(path, 503))["hint"]
        monkeypatch.setattr(service.recovery, "save", trio.sleep_forever)
        monkeypatch.setattr("betrace.service.api.endpoints.checkpoints.CHECKPOINT_SECONDS", 0.01)
        error = await client.post(path, 503)
        assert "behind" in error["message"]
        assert "/readyz" in error["hint"]
        monkeypatch.undo()


async def test_fallback_files(client, service):
    names = [each["name"] for each in (await client.get("/api/admin/fallback"))["fallbacks"]]
    assert names == list(service.pipeline.fallbacks)
    answer = await client.post("/api/admin/fallback/replay", 202)
    assert [each["name"] for each in answer["fallbacks"]] == names
    assert actions(service) == [{**ME, "action": "fallback.replay"}]


@pytest.mark.also_on_cluster
async def test_the_pipeline_is_drained_and_resumed(tmp_path):
    async with running(settings(tmp_path)) as service:
        client, path = ApiClient(service), "/api/admin/pipeline"
        assert (await client.get(path))["ingestion"] == "open"
        answer = await client.post(f"{path}/drain")
        assert (answer["ingestion"], answer["drained"], answer["waiting"]) == ("paused", True, {})
        assert set(answer["stages"].values()) == {"working"}
        assert (await client.post(f"{path}/resume"))["ingestion"] == "open"


async def test_a_drain_that_takes_too_long_gets_202(client, service):
    queue = service.pipeline.queues["trace-correlation"].send
    queue.send_nowait([0, 1])  # nothing consumes it, because the service does not run
    answer = await client.post("/api/admin/pipeline/drain?wait=0", 202)
    assert (answer["drained"], answer["waiting"]) == (False, {"trace-correlation": 2})


async def test_a_cache_is_emptied(client, service):
    for tenant in ("acme", "other"):
        service.registry.compiled(tenant)
    path = "/api/performance/cache-invalidate/ruleContainers"
    answer = await client.post(f"{path}?tenantId=acme")
    assert answer == {"cache": "ruleContainers", "invalidated": 1}
    assert (await client.post(path))["invalidated"] == 1
    assert [each.get("tenant") for each in audit(service)] == ["acme", None]


async def test_caches_are_warmed(client, service):
    await put_rule(service, "acme", "r", {"condition": "a"})
    answer = await client.post("/api/admin/cache-warmup")
    assert (answer["tenants"], answer["loaded"], answer["failed"]) == (1, 1, 0)
