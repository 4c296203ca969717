"""Another tenant's token, tried on everything: what is one tenant's is nobody else's."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from urllib.parse import quote

from betrace.service.api.app import create_api
from betrace.service.api.audit import Operator
from betrace.service.api.metrics.listener import metrics_app
from betrace.service.api.openapi import all_endpoints
from betrace.service.pipeline.request import Done
from betrace.service.receiver.heads import Head
from betrace.service.tenancy import changes
from betrace.service.tenancy.tokens import key_id, make_token
from tests.support.inprocess import closed, running, send, settings
from tests.support.spans import S
from tests.support.tenant_keys import READER, hs256, new_key, raw, sign, unsigned

OPERATOR = "operator-token-of-the-tests"
SCRAPER = "scrape-token-of-the-tests"
SECRET = "what_only_acme_knows"
RULE = "acmes-rule"
ME = Operator("tester", "here")
KEYS = {tenant: new_key() for tenant in ("acme", "beta")}
TRACE = bytes(range(16))

AUTH = {
    "enabled": True,
    "operator_token": OPERATOR,
    "read_only_token": READER,
    "scrape_token": SCRAPER,
}


class World:
    """A service with two tenants; acme has a rule, an open trace, a closed one, and signals."""

    def __init__(self, service):
        self.service = service
        app = create_api(service.tools, service.gate.authenticator, service.gate.closed)
        self.client = app.test_client()

    def token(self, tenant):
        return make_token(KEYS[tenant], tenant, time.time(), 600)

    async def ask(self, method, path, token=None, body=None, **headers):
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            given["Authorization"] = f"Bearer {token}"
        options = {} if body is None else {"json": body}
        answer = await self.client.open(path, method=method, headers=given, **options)
        return answer.status_code, await answer.get_data(as_text=True)


@asynccontextmanager
async def world(tmp_path, fill=True):
    config = settings(tmp_path, auth=AUTH, rules={"directory": ""})
    async with running(config) as service:
        made = World(service)
        for tenant, key in KEYS.items():
            await service.tenants.create(ME, tenant, None, None)
            service.gate.directory.change(tenant, changes.add_key(raw(key), 0))
        rule = {"name": SECRET, "condition": f"never {{ {SECRET} }}", "severity": "low"}
        if fill:
            service.tools.rule_writer.put("acme", RULE, rule, None)
            await service.reload_rules()
            await send(service, [S(1, SECRET, TRACE, service=SECRET, x=SECRET)], "acme")
            await closed(service)
            await send(service, [S(2, SECRET, bytes(range(1, 17)), service=SECRET)], "acme")
        yield made


def paths(service):
    """Every endpoint with acme's own ids in its path."""
    (found,) = [s for s in service.store.signals("acme")[0] if s.signal.trace_id == TRACE.hex()]
    ids = {
        "/api/v1/signals/{id}": {"id": found.signal.id},
        "/api/v1/signals/{id}/acknowledge": {"id": found.signal.id},
        "/api/v1/rules/{id}": {"id": RULE},
        "/api/v1/traces/{trace_id}": {"trace_id": TRACE.hex()},
    }
    other = {
        "name": "ledger",
        "action": "reset",
        "id": "1",
        "tenant": "acme",
        "kid": key_id(raw(KEYS["acme"])),
        "cache": "publicKeys",
    }
    for endpoint in all_endpoints():
        path = endpoint.path
        values = other | ids.get(path, {})
        for param in endpoint.path_params:
            path = path.replace("{" + param.name + "}", values[param.name])
        yield endpoint, path


async def test_read_only_tokens_change_nothing(tmp_path):
    async with world(tmp_path) as made:
        service = made.service
        key = KEYS["acme"]
        reader = make_token(key, "acme", time.time(), 600, read_only=True)
        changed = read = 0
        for endpoint, path in list(paths(service)):
            if "stream" in path or endpoint.access in ("none", "scrape"):
                continue
            token = reader if endpoint.access == "tenant" else READER
            body = None if endpoint.body is None else BODIES.get(endpoint.path, BODY)
            status, text = await made.ask(endpoint.method, path, token, body, If_Match="*")
            where = f"{endpoint.method} {path}: {status} {text[:300]}"
            if endpoint.method == "GET":
                read += status == 200
                assert "read-only" not in text, where
            elif endpoint.path in ("/api/v1/rules/test", "/api/v1/rules/validate"):
                assert "read-only" not in text, where
            else:
                changed += 1
                assert status == 403, where
                assert "this token is read-only" in text, where
        assert changed > 12
        assert read > 12
        assert [rule.id for rule in service.sources.rules.rules("acme")] == [RULE]
        assert await made.ask("GET", "/api/v1/rules", READER, X_Scope_OrgID="acme") == (
            await made.ask("GET", "/api/v1/rules", reader)
        )
        status, text = await made.ask(
            "DELETE", f"/api/v1/rules/{RULE}", READER, X_Scope_OrgID="acme"
        )
        assert (status, "this token is read-only" in text) == (403, True)
        head = [(b"authorization", f"Bearer {reader}".encode())]
        refused = await service.admission.admit("POST", "/v1/traces", head)
        assert not isinstance(refused, Head)
        assert refused.status == 403


BODY = {"condition": "a", "trace": {}, "name": "x", "severity": "low"}
BODIES = {"/api/v1/signals/{id}/acknowledge": {"note": "x"}}


async def test_no_endpoint_shows_or_changes_what_is_anothers(tmp_path):
    async with world(tmp_path) as made:
        token = made.token("beta")
        tried = 0
        for endpoint, path in list(paths(made.service)):
            if "stream" in path:
                continue  # see below
            body = None if endpoint.body is None else BODIES.get(endpoint.path, BODY)
            status, text = await made.ask(
                endpoint.method, path, token, body, X_Scope_OrgID="acme", If_Match="*"
            )
            tried += 1
            where = f"{endpoint.method} {path}: {status} {text[:300]}"
            assert SECRET not in text, where
            if endpoint.access in ("operator", "scrape"):
                assert status == 403, where
            elif endpoint.access == "tenant" and "{" in endpoint.path and endpoint.method != "PUT":
                assert status in (404, 412), where
            anonymous, _ = await made.ask(endpoint.method, path, None, body, X_Scope_OrgID="acme")
            assert (anonymous == 401) == (endpoint.access != "none"), where
        assert tried > 30
        status, text = await made.ask("GET", f"/api/v1/rules/{RULE}", made.token("acme"))
        assert (status, SECRET in text) == (200, True)  # beta's PUT made a rule of its own
        status, text = await made.ask("GET", f"/api/v1/traces/{TRACE.hex()}", made.token("acme"))
        assert (status, SECRET in text) == (200, True)
        status, text = await made.ask("GET", "/api/v1/signals", OPERATOR, X_Scope_OrgID="acme")
        assert (status, RULE in text) == (200, True)


async def test_a_stream_has_the_callers_signals_only(tmp_path):
    async with world(tmp_path) as made:
        mine = made.service.subscriptions.open("acme")
        theirs = made.service.subscriptions.open("beta")
        await send(made.service, [S(9, SECRET, b"\7" * 16)], "acme")
        assert (await mine.receive()).tenant == "acme"
        await made.service.tenants.revoke_key(ME, "acme", key_id(raw(KEYS["acme"])))
        assert theirs._receive.statistics().current_buffer_used == 0
        assert mine.send not in [each.send for each in made.service.subscriptions._open]
        theirs.close()


async def test_one_trace_id_of_two_tenants_is_two_traces(tmp_path):
    async with world(tmp_path) as made:
        await send(made.service, [S(1, "of_beta", TRACE), S(3, "of_beta", TRACE)], "beta")
        await closed(made.service)
        path = f"/api/v1/traces/{TRACE.hex()}"
        _, mine = await made.ask("GET", path, made.token("acme"))
        _, theirs = await made.ask("GET", path, made.token("beta"))
        assert SECRET in mine
        assert "of_beta" not in mine
        assert "of_beta" in theirs
        assert SECRET not in theirs


INJECTIONS = [
    "../acme",
    "..%2facme",
    "acme/../beta",
    "%2e%2e/acme",
    "acme%00",
    "' OR '1'='1",
    "'; DROP TABLE signals; --",
    "\"; ATTACH 'x' AS y; --",
    "t_acme.signals",
    "(a+)+$",
    "a\r\nX-Scope-OrgID: acme",
    "${jndi:ldap://x}",
    "\u0430cme",
    "x" * 3000,
]


async def test_injections_into_paths_parameters_headers_and_tokens(tmp_path):
    async with world(tmp_path) as made:
        for text in INJECTIONS:
            await inject(made, text)


async def inject(made, text):
    token = made.token("beta")
    quoted = quote(text)
    for path in (
        f"/api/v1/signals/{quoted}",
        f"/api/v1/rules/{quoted}",
        f"/api/v1/traces/{quoted}",
        f"/api/v1/signals?rule={quoted}&severity={quoted}",
        f"/api/v1/signals?cursor={quoted}",
        f"/api/v1/traces?service={quoted}&name={quoted}",
        f"/api/v1/traces?cursor={quoted}",
    ):
        status, answer = await made.ask("GET", path, token)
        assert status in (200, 400, 404), (path, status, answer)
        assert SECRET not in answer
    status, _ = await made.ask("DELETE", f"/api/v1/rules/{quoted}", token, If_Match="*")
    assert status in (400, 404, 405)
    status, _ = await made.ask("DELETE", f"/api/admin/tenants/{quoted}", OPERATOR)
    assert status in (400, 404, 405)
    status, _ = await made.ask("POST", "/api/admin/tenants", OPERATOR, {"tenant": text})
    assert status == 400
    forged = sign(KEYS["beta"], {"tenant": text, "exp": int(time.time()) + 60})
    assert (await made.ask("GET", "/api/v1/signals", forged))[0] == 401
    if "\r" not in text and text.isascii():
        admission = made.service.admission
        headers = [
            (b"content-type", b"application/json"),
            (b"x-scope-orgid", text.encode()),
            (b"authorization", f"Bearer {token}".encode()),
        ]
        assert (await admission.admit("POST", "/v1/traces", headers)).tenant == "beta"
        status, _ = await made.ask("GET", "/api/v1/signals", OPERATOR, X_Scope_OrgID=text)
        assert status == 403
    assert len(made.service.store.signals("acme")[0]) >= 1


CONDITIONS = [
    'a.where(x matches "(a+)+$")',
    'a.where(x matches "' + "(" * 5000 + '")',
    'a.where(x == "\'; DROP TABLE signals; --")',
    "never { " + "(" * 5000 + "a" + ")" * 5000 + " }",
    "{{ 7 * 7 }}",
    "__import__('os').system('id')",
]


async def test_injections_into_rules(tmp_path):
    async with world(tmp_path, fill=False) as made:
        for n, condition in enumerate(CONDITIONS):
            body = {"name": "x", "severity": "low", "condition": condition}
            path = f"/api/v1/rules/r{n}"
            status, answer = await made.ask("PUT", path, made.token("beta"), body)
            assert status in (201, 400), answer
            await made.service.reload_rules()
            span = S(1, "a", bytes([n + 1]) * 16, x="a" * 20_000 + "!")
            assert isinstance(await send(made.service, [span], "beta"), Done)
            await closed(made.service)


NOW = int(time.time())
KID = key_id(raw(KEYS["acme"]))
GOOD = {"tenant": "acme", "exp": NOW + 86_400}


FORGED = [
    unsigned({"alg": "none", "kid": KID}, GOOD),
    unsigned({"alg": "EdDSA", "kid": KID}, GOOD, "A" * 86),
    hs256(raw(KEYS["acme"]), KID, GOOD),
    sign(KEYS["beta"], GOOD),
    sign(KEYS["beta"], GOOD, kid=KID),
    sign(KEYS["acme"], {"tenant": "beta", "exp": NOW + 86_400}),
    sign(KEYS["acme"], {"tenant": "acme", "exp": NOW - 600}),
    sign(KEYS["acme"], GOOD | {"nbf": NOW + 86_400}),
    sign(KEYS["acme"], {"tenant": "acme"}),
    sign(KEYS["acme"], GOOD | {"more": "x" * 5000}),
    OPERATOR,
    SCRAPER,
]


async def test_forged_tokens_are_refused_by_both_listeners(tmp_path):
    async with world(tmp_path, fill=False) as made:
        admission = made.service.admission
        for number, token in enumerate(FORGED, 1):
            assert (await made.ask("GET", "/api/v1/signals", token))[0] == 401, number
            headers = [(b"content-type", b"application/json")]
            headers.append((b"authorization", f"Bearer {token}".encode()))
            assert (await admission.admit("POST", "/v1/traces", headers)).status == 401, number
            assert admission.refusals.requests["unauthenticated"] == number


async def test_a_revoked_key_and_a_deleted_tenant_are_out_at_once(tmp_path):
    async with world(tmp_path) as made:
        token = made.token("acme")
        headers = [(b"content-type", b"application/json")]
        headers.append((b"authorization", f"Bearer {token}".encode()))
        admission = made.service.admission
        assert isinstance(await admission.admit("POST", "/v1/traces", headers), Head)
        assert (await made.ask("GET", "/api/v1/signals", token))[0] == 200
        path = f"/api/admin/tenants/acme/keys/{KID}"
        assert (await made.ask("DELETE", path, made.token("beta")))[0] == 403
        assert (await made.ask("DELETE", path, OPERATOR))[0] == 200
        assert (await made.ask("GET", "/api/v1/signals", token))[0] == 401
        assert (await admission.admit("POST", "/v1/traces", headers)).status == 401
        assert (await made.ask("DELETE", "/api/admin/tenants/acme?wait=20", OPERATOR))[0] == 200
        status, text = await made.ask("GET", "/api/v1/signals", OPERATOR, X_Scope_OrgID="acme")
        assert (status, "there is no tenant" in text) == (403, True)
        assert (await made.ask("GET", "/api/v1/signals", made.token("beta")))[0] == 200


async def test_only_metrics_by_rule_name_tenants_and_metrics_want_a_token(tmp_path):
    async with world(tmp_path) as made:
        app = metrics_app(made.service.tools.exposition, made.service.gate.authenticator)
        for token, expected in ((None, 401), (made.token("acme"), 403), (SCRAPER, 200)):
            sent = []

            async def keep(message, sent=sent):
                sent.append(message)

            headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
            scope = {"type": "http", "path": "/metrics", "method": "GET", "headers": headers}
            await app(scope, None, keep)
            assert sent[0]["status"] == expected
        assert SECRET.encode() not in sent[1]["body"]
        naming = [line for line in sent[1]["body"].splitlines() if b"acme" in line]
        assert naming
        by_rule = (b"betrace_rule_signals_total{", b"betrace_rule_evaluations_total{")
        assert all(line.startswith(by_rule) for line in naming)
