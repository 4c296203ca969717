import pytest

from betrace.service.api.backend import AuditError, Operator
from betrace.service.storage.dead_letters import DeadLetterError
from tests.service.api.test_app import Client
from tests.support.scripted_backend import ScriptedBackend
from tests.support.tenant_keys import authenticating, bearer, new_key

ME = Operator("operator", "<local>")


def letter(number):
    return {"id": str(number), "stage": "rule-evaluation", "tenant": "acme", "error": "boom"}


class ScriptedAdmin:
    """Says what the test wrote down, and remembers what it was asked to do."""

    def __init__(self):
        self.done = []
        self.error = None
        self.letters = {number: letter(number) for number in range(1, 6)}
        self.drained = True

    def _do(self, *what):
        self.done.append(what)
        if self.error is not None:
            raise self.error

    def breakers(self):
        return [{"name": "ledger", "state": "closed"}, {"name": "duckdb", "state": "open"}]

    async def act_on_breaker(self, who, name, action):
        self._do(who, name, action)
        return {"name": name, "state": "open"}

    async def dead_letters(self, stage, tenant, limit, after):
        self._do(stage, tenant, limit, after)
        found = [value for number, value in self.letters.items() if number > after]
        return found[:limit], after + limit if len(found) > limit else None

    async def dead_letter(self, letter_id):
        found = self.letters.get(letter_id)
        return None if found is None else {**found, "payload": {"traces": []}}

    async def retry_dead_letters(self, who, letter_id, stage, tenant):
        self._do(who, "retry", letter_id, stage, tenant)
        return len(self.letters) if letter_id is None else int(letter_id in self.letters)

    async def discard_dead_letter(self, who, letter_id):
        self._do(who, "discard", letter_id)
        return self.letters.pop(letter_id, None) is not None

    def fallbacks(self):
        return [{"name": "ledger", "pendingFiles": []}]

    async def checkpoint(self):
        return {"savedAt": None}

    async def save_checkpoint(self, who):
        self._do(who, "checkpoint")
        return self.saved

    saved = True
    caches = ("ruleContainers", "publicKeys")

    async def invalidate_cache(self, who, name, tenant):
        self._do(who, name, tenant)
        return 7

    async def warm_up_caches(self, who):
        self._do(who, "warm-up")
        return {"tenants": 2, "loaded": 4, "failed": 0, "seconds": 0.1}

    async def write_back_now(self, who):
        self._do(who, "replay")

    def pipeline(self):
        return {"ingestion": "open", "drained": self.drained}

    async def pause(self, who):
        self._do(who, "pause")
        return self.pipeline()

    async def resume(self, who):
        self._do(who, "resume")
        return self.pipeline()

    async def drain(self, who, wait_seconds):
        self._do(who, "drain", wait_seconds)
        return self.pipeline()


@pytest.fixture
def client():
    backend = ScriptedBackend()
    backend.admin = ScriptedAdmin()
    return Client(backend)


@pytest.fixture
def admin(client):
    return client.backend.admin


async def test_breakers_are_listed(client):
    answer = await client.get("/api/admin/breakers")
    assert [each["name"] for each in answer["breakers"]] == ["ledger", "duckdb"]


@pytest.mark.parametrize("action", ["trip", "reset", "force-open", "disable"])
async def test_breakers_are_acted_on(client, admin, action):
    answer = await client.ask("POST", f"/api/admin/breakers/ledger/{action}")
    assert answer["name"] == "ledger"
    assert admin.done == [(ME, "ledger", action)]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/admin/breakers/leger/trip", 404, "did you mean ledger?"),
        ("/api/admin/breakers/ledger/explode", 400, "one of trip, reset, force-open, disable"),
        ("/api/admin/dead-letters/99/retry", 404, "retried meanwhile"),
        ("/api/admin/dead-letters/99/discard", 404, "retried meanwhile"),
        ("/api/admin/dead-letters/x/retry", 400, "an integer from 1"),
        ("/api/admin/dead-letters/0/discard", 400, "an integer from 1"),
        ("/api/admin/dead-letters/retry?tenant=Bad!", 400, "tenant name"),
        ("/api/admin/pipeline/drain?wait=61", 400, "from 0 to 60"),
    ],
)
async def test_what_cannot_be_done_is_told_with_a_hint(client, path, status, words):
    error = await client.ask("POST", path, status)
    assert words in error["hint"]


async def test_who_acts_may_give_a_name(client, admin):
    await client.ask("POST", "/api/admin/pipeline/pause", x_operator="kim@example.org")
    assert admin.done == [(Operator("kim@example.org", "<local>"), "pause")]
    error = await client.ask("POST", "/api/admin/pipeline/pause", 400, x_operator="a b")
    assert "X-Operator" in error["message"]
    assert len(admin.done) == 1


async def test_dead_letters_in_pages(client, admin):
    seen, path = [], "/api/admin/dead-letters?limit=2&stage=rule-evaluation&tenant=acme"
    while True:
        answer = await client.get(path)
        seen += [each["id"] for each in answer["deadLetters"]]
        if answer["next"] is None:
            break
        path = f"/api/admin/dead-letters?limit=2&cursor={answer['next']}"
    assert seen == ["1", "2", "3", "4", "5"]
    assert admin.done[0] == ("rule-evaluation", "acme", 2, 0)


async def test_one_dead_letter(client):
    assert (await client.get("/api/admin/dead-letters/3"))["payload"] == {"traces": []}
    assert (await client.get("/api/admin/dead-letters/99", 404))["code"] == "not_found"


async def test_dead_letters_are_retried_and_discarded(client, admin):
    assert await client.ask("POST", "/api/admin/dead-letters/2/retry", 202) == {"retried": 1}
    path = "/api/admin/dead-letters/retry?stage=projection"
    assert await client.ask("POST", path, 202) == {"retried": 5}
    assert await client.ask("POST", "/api/admin/dead-letters/2/discard") == {"discarded": 1}
    assert await client.ask("POST", "/api/admin/dead-letters/2/discard", 404)
    assert admin.done[:3] == [
        (ME, "retry", 2, None, None),
        (ME, "retry", None, "projection", None),
        (ME, "discard", 2),
    ]


async def test_checkpoints(client, admin):
    assert await client.get("/api/admin/checkpoint") == {"savedAt": None}
    assert admin.done == []
    assert await client.ask("POST", "/api/admin/checkpoint", 200) == {"savedAt": None}
    assert admin.done == [(ME, "checkpoint")]
    admin.saved = False
    assert "disk" in (await client.ask("POST", "/api/admin/checkpoint", 503))["hint"]
    admin.saved = None
    assert "behind" in (await client.ask("POST", "/api/admin/checkpoint", 503))["message"]


async def test_fallbacks(client, admin):
    assert (await client.get("/api/admin/fallback"))["fallbacks"][0]["name"] == "ledger"
    await client.ask("POST", "/api/admin/fallback/replay", 202)
    assert admin.done == [(ME, "replay")]


async def test_the_pipeline(client, admin):
    assert (await client.get("/api/admin/pipeline"))["ingestion"] == "open"
    await client.ask("POST", "/api/admin/pipeline/resume")
    await client.ask("POST", "/api/admin/pipeline/drain")
    admin.drained = False
    await client.ask("POST", "/api/admin/pipeline/drain?wait=3", 202)
    assert admin.done == [(ME, "resume"), (ME, "drain", 10), (ME, "drain", 3)]


@pytest.mark.parametrize(
    "error", [AuditError("the audit log cannot be written"), DeadLetterError("the disk is full")]
)
async def test_an_action_that_cannot_be_done_now_is_503(client, admin, error):
    admin.error = error
    told = await client.ask("POST", "/api/admin/dead-letters/2/retry", 503)
    assert str(error) in told["message"]
    assert "room on the disk" in told["hint"]


async def test_actions_need_the_operator_token():
    key = new_key()
    backend = ScriptedBackend()
    backend.admin = ScriptedAdmin()
    with authenticating({"acme": key}) as authenticator:
        client = Client(backend, authenticator)
        await client.ask("POST", "/api/admin/pipeline/pause", 401)
        await client.get("/api/admin/dead-letters", 401)
        await client.get("/api/admin/dead-letters", 403, Authorization=bearer(key, "acme"))
    assert backend.admin.done == []


async def test_a_cache_is_emptied(client, admin):
    path = "/api/performance/cache-invalidate/"
    answer = await client.ask("POST", path + "publicKeys")
    assert answer == {"cache": "publicKeys", "invalidated": 7}
    await client.ask("POST", path + "publicKeys?tenantId=acme", x_operator="kim")
    assert admin.done == [
        (ME, "publicKeys", None),
        (Operator("kim", "<local>"), "publicKeys", "acme"),
    ]
    assert "publicKeys" in str(await client.ask("POST", path + "publicKey", 404))
    await client.ask("POST", path + "publicKeys?tenantId=A%20B", 400)
    assert len(admin.done) == 2


async def test_caches_are_warmed(client, admin):
    assert (await client.ask("POST", "/api/admin/cache-warmup"))["loaded"] == 4
    admin.error = AuditError("the audit log cannot be written")
    await client.ask("POST", "/api/admin/cache-warmup", 503)
