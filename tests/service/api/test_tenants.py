"""Endpoints for tenants."""

import json

import pytest

from betrace.service.tenancy.directory import DirectoryError
from betrace.service.tenancy.tokens import key_id, public_pem
from tests.support.api_client import ApiClient
from tests.support.inprocess import running, settings
from tests.support.tenant_keys import new_key, raw

T = "/api/admin/tenants"
FIRST, SECOND = new_key(), new_key()


async def test_tenants_in_pages(client):
    for name in ("acme", "beta", "gamma"):
        assert (await client.post(T, 201, {"tenant": name}))["name"] == name
    page = await client.get(f"{T}?limit=2")
    assert ([each["name"] for each in page["tenants"]], page["next"]) == (["acme", "beta"], "beta")
    page = await client.get(f"{T}?limit=2&cursor=beta")
    assert ([each["name"] for each in page["tenants"]], page["next"]) == (["gamma"], None)
    assert (await client.get(f"{T}/gamma"))["state"] == "active"
    assert "no tenant" in (await client.get(f"{T}/other", 404))["message"]


async def test_a_tenants_life(tmp_path):
    async with running(settings(tmp_path)) as service:
        client = ApiClient(service)
        body = {"tenant": "acme", "quota": 5, "publicKey": public_pem(FIRST)}
        made = await client.post(T, 201, body)
        assert (made["state"], made["quota"]) == ("active", 5)
        assert [key["kid"] for key in made["keys"]] == [key_id(raw(FIRST))]
        assert (await client.ask("PUT", f"{T}/acme/quota", 200, {"spansPerSecond": 0}))[
            "quota"
        ] == 0
        assert (await client.ask("PUT", f"{T}/acme/quota", 200, {}))["quota"] is None
        changed = await client.post(f"{T}/acme/keys", 201, {"publicKey": public_pem(SECOND)})
        expires = {key["kid"]: key["expiresAt"] for key in changed["keys"]}
        assert expires[key_id(raw(FIRST))] is not None
        assert expires[key_id(raw(SECOND))] is None
        left = await client.ask("DELETE", f"{T}/acme/keys/{key_id(raw(FIRST))}")
        assert [key["kid"] for key in left["keys"]] == [key_id(raw(SECOND))]
        answer = await client.ask("DELETE", f"{T}/acme", X_Operator="kim")
        assert answer == {"tenant": "acme", "state": "deleted"}
    lines = (tmp_path / "data/audit.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["action"].removeprefix("tenants.") for record in records] == [
        "create",
        "quota",
        "quota",
        "add-key",
        "revoke-key",
        "delete",
    ]
    assert records[3]["graceSeconds"] == 86_400
    assert records[5]["operator"] == "kim"


async def test_a_deletion_that_takes_longer_gets_202(client):
    await client.post(T, 201, {"tenant": "acme"})  # the service does not run, so none is completed
    answer = await client.ask("DELETE", f"{T}/acme?wait=0", 202)
    assert answer == {"tenant": "acme", "state": "deleting"}
    assert (await client.get(f"{T}/acme"))["state"] == "deleting"


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
        ("POST", T, {"tenant": "a", "publicKey": "x"}, "PEM"),
        ("PUT", f"{T}/acme/quota", {"spansPerSecond": 10**10}, "spansPerSecond is"),
        ("POST", f"{T}/acme/keys", {"publicKey": "x", "graceSeconds": -5}, "graceSeconds is -5"),
        ("DELETE", f"{T}/acme/keys/x", None, "kid is 'x'"),
        ("DELETE", f"{T}/-acme", None, "tenant is '-acme'"),
        ("DELETE", f"{T}/acme?wait=100", None, "wait is '100'"),
    ],
)
async def test_invalid_requests_change_nothing(client, method, path, body, says):
    await client.post(T, 201, {"tenant": "acme", "quota": 7})
    before = await client.get(T)
    assert says in (await client.ask(method, path, 400, body))["message"]
    assert await client.get(T) == before


async def test_missing_and_conflicting_tenants(client):
    await client.post(T, 201, {"tenant": "acme"})
    assert "exists" in (await client.post(T, 409, {"tenant": "acme"}))["message"]
    for method, path, body in (
        ("DELETE", f"{T}/other", None),
        ("PUT", f"{T}/other/quota", {}),
        ("POST", f"{T}/other/keys", {"publicKey": public_pem(FIRST)}),
        ("DELETE", f"{T}/acme/keys/{'k' * 43}", None),
    ):
        await client.ask(method, path, 404, body)


@pytest.mark.one_process("the tenants of a cluster are in a bucket")
async def test_a_failing_disk_gets_503(client, service, monkeypatch):
    def fails(*_):
        raise DirectoryError("the disk is full")

    monkeypatch.setattr(service.gate.directory, "change", fails)
    error = await client.post(T, 503, {"tenant": "acme"})
    assert error["message"] == "the disk is full"
