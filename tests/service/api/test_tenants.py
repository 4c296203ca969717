import pytest

from betrace.service.api.backend import AuditError, Operator
from betrace.service.tenancy.directory import (
    DirectoryError,
    TenantConflictError,
    UnknownTenantError,
)
from betrace.service.tenancy.tokens import BadKeyError
from tests.service.api.test_app import Client
from tests.support.scripted_backend import ScriptedBackend

ME = Operator("operator", "<local>")
KID = "k" * 43
ACME = {"name": "acme", "state": "active", "createdAt": None, "quota": None, "keys": []}


class ScriptedTenants:
    """Says what the test wrote down, and remembers what it was asked to do."""

    def __init__(self):
        self.done = []
        self.error = None
        self.deleted = True

    def _do(self, *what):
        self.done.append(what)
        if self.error is not None:
            raise self.error

    async def page(self, after, limit):
        self._do(after, limit)
        return [ACME], "acme" if not after else None

    async def get(self, name):
        return ACME if name == "acme" else None

    async def create(self, who, name, quota, public_key):
        self._do(who, "create", name, quota, public_key)
        return ACME

    async def set_quota(self, who, name, quota):
        self._do(who, "quota", name, quota)
        return ACME

    async def add_key(self, who, name, public_key, grace_seconds):
        self._do(who, "key", name, public_key, grace_seconds)
        return ACME

    async def revoke_key(self, who, name, kid):
        self._do(who, "revoke", name, kid)
        return ACME

    async def delete(self, who, name, wait_seconds):
        self._do(who, "delete", name, wait_seconds)
        return self.deleted


@pytest.fixture
def client():
    backend = ScriptedBackend()
    backend.tenants = ScriptedTenants()
    return Client(backend)


def done(client):
    return client.backend.tenants.done


T = "/api/admin/tenants"


async def test_tenants_in_pages(client):
    assert await client.get(f"{T}?limit=1") == {"tenants": [ACME], "next": "acme"}
    assert await client.get(f"{T}?limit=1&cursor=acme") == {"tenants": [ACME], "next": None}
    assert done(client) == [("", 1), ("acme", 1)]
    assert await client.get(f"{T}/acme") == ACME
    assert "no tenant" in (await client.get(f"{T}/other", 404))["message"]


async def test_what_operators_do(client):
    assert await client.ask("POST", T, 201, {"tenant": "acme"}) == ACME
    await client.ask("POST", T, 201, {"tenant": "acme", "quota": 5, "publicKey": "PEM"})
    await client.ask("PUT", f"{T}/acme/quota", 200, {"spansPerSecond": 0})
    await client.ask("PUT", f"{T}/acme/quota", 200, {})
    await client.ask("POST", f"{T}/acme/keys", 201, {"publicKey": "PEM"})
    await client.ask("POST", f"{T}/acme/keys", 201, {"publicKey": "PEM", "graceSeconds": 0})
    await client.ask("DELETE", f"{T}/acme/keys/{KID}")
    assert await client.ask("DELETE", f"{T}/acme") == {"tenant": "acme", "state": "deleted"}
    client.backend.tenants.deleted = False
    answer = await client.ask("DELETE", f"{T}/acme?wait=0", 202, X_Operator="kim")
    assert answer == {"tenant": "acme", "state": "deleting"}
    assert done(client) == [
        (ME, "create", "acme", None, None),
        (ME, "create", "acme", 5, "PEM"),
        (ME, "quota", "acme", 0),
        (ME, "quota", "acme", None),
        (ME, "key", "acme", "PEM", 86_400),
        (ME, "key", "acme", "PEM", 0),
        (ME, "revoke", "acme", KID),
        (ME, "delete", "acme", 10),
        (Operator("kim", "<local>"), "delete", "acme", 0),
    ]


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        ("POST", T, {}, "tenant is missing"),
        ("POST", T, {"tenant": "Acme"}, "tenant is 'Acme'"),
        ("POST", T, {"tenant": 5}, "wrong type"),
        ("POST", T, {"tenant": "a", "quota": -1}, "quota is -1"),
        ("POST", T, {"tenant": "a", "quota": True}, "wrong type"),
        ("POST", T, {"tenant": "a", "quota": 1.5}, "wrong type"),
        ("POST", T, {"tenant": "a", "privateKey": "x"}, "unknown field"),
        ("PUT", f"{T}/acme/quota", {"spansPerSecond": 10**10}, "spansPerSecond is"),
        ("POST", f"{T}/acme/keys", {"publicKey": "x", "graceSeconds": -5}, "graceSeconds is -5"),
        ("DELETE", f"{T}/acme/keys/x", None, "kid is 'x'"),
        ("DELETE", f"{T}/-acme", None, "tenant is '-acme'"),
        ("DELETE", f"{T}/acme?wait=100", None, "wait is '100'"),
    ],
)
async def test_what_is_wrong_is_told_and_not_done(client, method, path, body, says):
    assert says in (await client.ask(method, path, 400, body))["message"]
    assert done(client) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownTenantError("there is no tenant acme", "see"), 404),
        (TenantConflictError("the tenant acme exists", "choose"), 409),
        (BadKeyError("no key"), 400),
        (DirectoryError("disk"), 503),
        (AuditError("disk"), 503),
    ],
)
async def test_what_keeps_it_from_being_done_is_told(client, error, status):
    client.backend.tenants.error = error
    told = await client.ask("POST", T, status, {"tenant": "acme"})
    assert told["message"] == str(error)
