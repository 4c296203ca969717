"""``betrace tenants`` against the API of a service in this process."""

import json
import re

import httpx
import pytest
from click.testing import CliRunner

from betrace.service.cli import api_client as commands
from betrace.service.cli.main import cli
from betrace.service.tenancy.tokens import claimed, key_id, public_pem, read_private_key, verify

KID = "k" * 43


@pytest.fixture
def service(monkeypatch, tmp_path):
    """A scripted service: ``answers`` by method and path; ``asked`` has its requests."""
    monkeypatch.chdir(tmp_path)
    for name in ("BETRACE_TOKEN", "BETRACE_AUTH__OPERATOR_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    class Service:
        def __init__(self):
            self.asked = []
            self.answers = {}

    scripted = Service()

    def answer(request):
        path = request.url.raw_path.decode().removeprefix("/api/admin/tenants")
        body = json.loads(request.content) if request.content else None
        scripted.asked.append((request.method, path, body, request.headers.get("authorization")))
        status, said = scripted.answers.get((request.method, path.partition("?")[0]), (404, {}))
        return httpx.Response(status, json=said)

    real = httpx.Client
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(
        commands.httpx, "Client", lambda **options: real(transport=transport, **options)
    )
    return scripted


def run(*args, code=0, **options):
    result = CliRunner().invoke(cli, ["tenants", *args], **options)
    assert result.exit_code == code, result.output
    return result.output


def tenant(name, **more):
    return {"name": name, "state": "active", "createdAt": None, "quota": None, "keys": []} | more


def test_create_makes_a_key_and_sends_its_public_half(service, tmp_path):
    service.answers["POST", ""] = (201, tenant("acme"))
    out = run("create", "acme", "--quota", "5", "--token", "secret")
    assert "acme.pem" in out
    key = read_private_key(tmp_path / "acme.pem")
    body = {"tenant": "acme", "publicKey": public_pem(key), "quota": 5}
    assert service.asked == [("POST", "", body, "Bearer secret")]
    assert "PRIVATE" not in json.dumps(body)


def test_the_key_of_a_refused_tenant_is_removed(service, tmp_path):
    error = {"error": {"message": "the tenant acme exists", "hint": "choose another name"}}
    service.answers["POST", ""] = (409, error)
    out = run("create", "acme", code=3)
    assert out == "betrace: the tenant acme exists; choose another name\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "acme.pem").write_text("mine")
    assert "acme.pem already exists" in run("create", "acme", code=3)
    assert (tmp_path / "acme.pem").read_text() == "mine"


def test_create_without_a_key(service, tmp_path):
    service.answers["POST", ""] = (201, tenant("acme"))
    assert json.loads(run("create", "acme", "--no-key", "--json")) == {
        "tenant": "acme",
        "key": None,
    }
    assert list(tmp_path.iterdir()) == []


def test_a_token_is_made_without_the_service(service, tmp_path):
    service.answers["POST", ""] = (201, tenant("acme"))
    run("create", "acme")
    service.asked.clear()
    out = run("token", "acme", "--for", "2h")
    (token,) = re.findall(r"OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20(\S+)", out)
    public = read_private_key(tmp_path / "acme.pem").public_key().public_bytes_raw()
    assert claimed(token) == ("acme", key_id(public))
    verify(token, "acme", public, 0)
    assert f'authorization: "Bearer {token}"' in out
    shown = json.loads(run("token", "acme", "--json"))
    assert shown["authorization"] == f"Bearer {shown['token']}"
    assert [(method, authorization) for method, _, _, authorization in service.asked] == [
        ("GET", None),
        ("GET", None),
    ]  # only to learn whether authentication is off
    assert "not an Ed25519 private key" in run("token", "acme", "--key", "/dev/null", code=3)
    for bad in ("2", "h", "2y", "99999999d", "-1h"):
        assert "is not a duration" in run("token", "acme", "--for", bad, code=2)


def test_a_read_only_token_is_printed_for_reading(service, tmp_path):
    service.answers["POST", ""] = (201, tenant("acme"))
    run("create", "acme")
    out = run("token", "acme", "--read-only")
    (token,) = re.findall(r"export BETRACE_TOKEN=(\S+)", out)
    public = read_private_key(tmp_path / "acme.pem").public_key().public_bytes_raw()
    assert verify(token, "acme", public, 0)[1]
    assert "OTEL_EXPORTER" not in out  # nothing can be sent with it
    assert json.loads(run("token", "acme", "--read-only", "--json"))["readOnly"] is True


def test_a_token_has_no_effect_without_authentication(service):
    service.answers["POST", ""] = (201, tenant("acme"))
    run("create", "acme")
    warning = "authentication is off at http://127.0.0.1:8090, so this token has no effect there"
    assert warning not in run("token", "acme")  # the service answers 404 here
    service.answers["GET", "/api/v1/signals"] = (401, {})
    assert warning not in run("token", "acme")
    service.answers["GET", "/api/v1/signals"] = (200, {"signals": []})
    assert warning in run("token", "acme")


@pytest.mark.parametrize("variable", ["BETRACE_TOKEN", "BETRACE_AUTH__OPERATOR_TOKEN"])
def test_the_token_comes_from_a_variable(service, monkeypatch, variable):
    service.answers["GET", ""] = (200, {"tenants": [], "next": None})
    monkeypatch.setenv("BETRACE_AUTH__OPERATOR_TOKEN", "the service's own")
    monkeypatch.setenv(variable, "secret")
    run("list")
    assert service.asked[0][3] == "Bearer secret"


def test_list(service):
    keys = [
        {"kid": KID, "createdAt": "", "expiresAt": "2026-01-01T00:00:00.000000000Z"},
        {"kid": "j" * 43, "createdAt": "", "expiresAt": None},
    ]
    made = tenant("acme", createdAt="2026-01-01T00:00:00.0Z", quota=5, keys=keys)
    service.answers["GET", ""] = (200, {"tenants": [made, tenant("b", quota=0)], "next": None})
    out = run("list")
    assert re.search(rf"acme +active +2026-01-01T00:00:00Z +5/s +{KID} \(until 2026", out)
    assert re.search(r"b +active +- +none +-", out)
    assert json.loads(run("list", "--json"))[0] == made
    service.answers["GET", ""] = (200, {"tenants": [], "next": None})
    assert run("list") == "no tenants\n"


def test_delete_asks_first(service):
    service.answers["DELETE", "/acme"] = (200, {"tenant": "acme", "state": "deleted"})
    run("delete", "acme", input="n\n", code=1)
    assert service.asked == []
    assert "deleted the tenant acme" in run("delete", "acme", input="y\n")
    service.answers["DELETE", "/acme"] = (202, {"tenant": "acme", "state": "deleting"})
    assert "continues in the background" in run("delete", "acme", "--yes")
    assert "is not a tenant name" in run("delete", "../acme", "--yes", code=2)


def test_keys_are_rotated_and_revoked(service, tmp_path):
    service.answers["POST", "/acme/keys"] = (201, tenant("acme"))
    assert "has a new key" in run("rotate-key", "acme", "--key", "two.pem", "--grace", "0s")
    assert service.asked[0][2]["graceSeconds"] == 0
    assert (tmp_path / "two.pem").exists()
    service.answers["DELETE", f"/acme/keys/{KID}"] = (200, tenant("acme"))
    assert "revoked the key" in run("revoke-key", "acme", KID)
    run("revoke-key", "acme", "../../beta", code=3)
    assert service.asked[-1][1] == "/acme/keys/..%2F..%2Fbeta"


def test_quota(service):
    service.answers["PUT", "/acme/quota"] = (200, tenant("acme", quota=7))
    assert run("quota", "acme", "7") == "the quota of acme is now: 7/s\n"
    service.answers["PUT", "/acme/quota"] = (200, tenant("acme"))
    assert run("quota", "acme", "default") == "the quota of acme is now: as configured\n"
    assert [asked[2] for asked in service.asked] == [{"spansPerSecond": 7}, {}]
    run("quota", "acme", "much", code=2)


def test_an_unreachable_service():
    out = run("list", "--url", "http://127.0.0.1:1", code=3)
    assert "there is no BeTrace service at http://127.0.0.1:1" in out
