"""Who may see and change what: sessions, tenants, forms of other origins, and signing in."""

from __future__ import annotations

import json
import time
from contextlib import asynccontextmanager

import pytest

from betrace.service.api.audit import Operator
from betrace.service.api.pages.forms import local
from betrace.service.api.pages.sessions import MOST_SESSIONS, SESSION_SECONDS, Sessions
from betrace.service.tenancy.tokens import key_id, make_token, public_pem
from tests.service.api.pages.conftest import Browser, browsing, signal_id
from tests.support.inprocess import closed, put_rule, send
from tests.support.spans import S
from tests.support.tenant_keys import OPERATOR, READER, new_key, raw

KEYS = {tenant: new_key() for tenant in ("acme", "beta")}
AUTH = {"enabled": True, "operator_token": OPERATOR, "read_only_token": READER}
ME = Operator("tester", "here")
RULE = {"condition": "never { bypass }", "severity": "high", "name": "acmes-secret"}
TRACE = bytes([7] * 16)


def token(tenant="acme", seconds=600):
    return make_token(KEYS[tenant], tenant, time.time(), seconds)


@asynccontextmanager
async def tenants(tmp_path):
    """A service with two tenants, of which acme has a signal."""
    async with browsing(tmp_path, "rules: []\n", auth=AUTH) as browser:
        service = browser.service
        for tenant, key in KEYS.items():
            await service.tenants.create(ME, tenant, None, public_pem(key))
        await put_rule(service, "acme", "mine", RULE)
        await send(service, [S(1, "bypass", TRACE)], "acme")
        await closed(service)
        yield browser


async def sign_in(browser, secret, following="/"):
    fields = {"token": secret, "next": following}
    return await browser.post("/sign-in", fields, token=False)


def audited(service):
    lines = (service.settings.storage.path / "audit.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


async def test_a_link_leads_back_to_its_page_after_signing_in(tmp_path):
    async with tenants(tmp_path) as browser:
        path = f"/signals/{signal_id(browser, 'mine', 'acme')}"
        await browser.get(f"{path}?span=1", 303)
        assert browser.location == "/sign-in?next=" + path.replace("/", "%2F") + "%3Fspan%3D1"
        form = await browser.get(browser.location)
        assert f'value="{path}?span=1"' in form
        await sign_in(browser, token(), path)
        assert browser.location == path
        cookie = browser.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert "Secure" not in cookie  # the service has no TLS
        assert token()[:20] not in cookie
        assert "acmes-secret" in await browser.get(path)
        assert "Sign out" in browser.page
        await browser.get("/api/v1/signals", 401)  # the API knows no sessions
        await browser.get(path)
        await browser.post("/sign-out", {})
        await browser.get(path, 303)


@pytest.mark.parametrize(
    "secret",
    ["", "x", "a.b.c", OPERATOR + "x", token("acme", -600)],
    ids=["empty", "short", "dots", "almost", "expired"],
)
async def test_a_wrong_token_opens_nothing(tmp_path, secret):
    async with tenants(tmp_path) as browser:
        await browser.post("/sign-in", {"token": secret, "next": "/"}, 401, token=False)
        assert "set-cookie" not in browser.headers
        assert 'role="alert"' in browser.page
        assert len(secret) < 5 or secret not in browser.page
        await browser.get("/", 303)


async def test_a_session_ends_with_its_key(tmp_path):
    async with tenants(tmp_path) as browser:
        await sign_in(browser, token())
        await browser.get("/signals")
        service = browser.service
        await service.tenants.revoke_key(ME, "acme", key_id(raw(KEYS["acme"])))
        await browser.get("/signals", 303)


async def test_a_tenant_sees_only_its_own(tmp_path):
    async with tenants(tmp_path) as browser:
        signal = signal_id(browser, "mine", "acme")
        await sign_in(browser, token("beta"))
        for path in (
            f"/signals/{signal}",
            f"/traces/{TRACE.hex()}",
            f"/traces/{TRACE.hex()}/spans/{1:016x}",
            "/rules/mine",
            "/rule-editor?id=mine",
        ):
            for tenant in ("", "acme"):
                joined = "&" if "?" in path else "?"
                await browser.get(path + (f"{joined}tenant={tenant}" if tenant else ""), 404)
        for path in ("/", "/signals", "/traces", "/rules"):
            for page in (await browser.get(path), await browser.get(f"{path}?tenant=acme")):
                assert "acmes-secret" not in page
                assert TRACE.hex() not in page
        await browser.get("/rule-editor")
        for path in (f"/signals/{signal}/acknowledge", "/rules/mine/mute", "/rules/mine/unmute"):
            fields = {"note": "x", "for": "1h", "reason": "x"}
            await browser.post(path, fields, 404)
        fields = {"action": "test", "condition": "a", "trace_id": TRACE.hex()}
        await browser.get("/rule-editor")
        assert "there is no trace" in await browser.post("/rule-editor", fields, 404)


async def test_an_operator_chooses_a_tenant(tmp_path):
    async with tenants(tmp_path) as browser:
        await sign_in(browser, OPERATOR)
        page = await browser.get("/signals")
        assert "Choose a tenant" in page
        assert "/signals?tenant=acme" in browser.links("/signals")
        await browser.get("/signals?tenant=acme")
        (link,) = browser.links("/signals/")
        assert link.endswith("?tenant=acme")
        assert "acmes-secret" in await browser.get(link)
        assert all("tenant=acme" in each for each in browser.links("/traces/"))
        await browser.post(link.replace("?", "/acknowledge?"), {"note": "on it", "by": "ann"})
        assert browser.location == link
        assert audited(browser.service)[-1]["tenant"] == "acme"
        await browser.get("/signals?tenant=nobody", 403)
        await browser.get("/signals?tenant=UPPER", 403)


async def test_without_authentication_the_address_names_the_tenant(tmp_path):
    async with browsing(tmp_path, "rules: []\n") as browser:
        await put_rule(browser.service, "acme", "mine", RULE)
        await send(browser.service, [S(1, "bypass", TRACE)], "acme")
        await closed(browser.service)
        assert "No trace has broken" in await browser.get("/signals")
        await browser.get("/signals?tenant=acme")
        (link,) = browser.links("/signals/")
        assert "acmes-secret" in await browser.get(link)
        assert "acmes-secret" in await browser.get("/rules", **{"x-scope-orgid": "acme"})
        await browser.get("/?tenant=UPPER", 400)
        await browser.get("/sign-in")
        assert "Authentication is off" in browser.page
        await sign_in(browser, "anything")


async def test_forms_change_and_are_audited(tmp_path):
    async with tenants(tmp_path) as browser:
        path = f"/signals/{signal_id(browser, 'mine', 'acme')}"
        await sign_in(browser, token())
        await browser.get(path)
        await browser.post(f"{path}/acknowledge", {"note": "I <look>", "by": "ann@shop"})
        assert browser.location == path
        page = await browser.get(path)
        assert "Acknowledged by <bdi>ann@shop</bdi>" in page
        assert "I &lt;look&gt;" in page
        assert 'value="ann@shop"' in page  # the next form knows the name
        muted = {"for": "4h", "reason": "a deployment", "by": "ann@shop", "back": path}
        await browser.post("/rules/mine/mute", muted)
        assert browser.location == path
        assert "a deployment" in await browser.get(path)
        assert "muted" in await browser.get("/rules")
        await browser.get("/rules/mine")
        await browser.post("/rules/mine/unmute", {"back": "https://evil.example/"})
        assert browser.location == "/rules/mine"
        done = [(each["operator"], each["action"]) for each in audited(browser.service)[-3:]]
        assert done == [
            ("ann@shop", "signal.acknowledge"),
            ("ann@shop", "rule.mute"),
            ("acme", "rule.unmute"),
        ]
        await browser.get("/rules/mine")
        wrong = {"for": "4h", "reason": "", "by": "ann"}
        assert "reason must have" in await browser.post("/rules/mine/mute", wrong, 400)
        await browser.get("/rules/mine")
        wrong = {"for": "4h", "reason": "x", "by": "not a name"}
        assert "X-Operator" in await browser.post("/rules/mine/mute", wrong, 400)


@pytest.mark.parametrize("authenticated", [True, False])
async def test_forms_of_other_pages_change_nothing(tmp_path, authenticated):
    async with tenants(tmp_path) if authenticated else browsing(tmp_path) as browser:
        if authenticated:
            await sign_in(browser, token())
        fields = {"for": "1h", "reason": "x"}
        path = "/rules/mine/mute" if authenticated else "/rules/fraud-check/mute"
        await browser.get("/rule-editor")
        good = browser.form_token()
        await browser.post(path, fields, 403, token=False)
        await browser.post(path, {**fields, "form_token": good[::-1]}, 403, token=False)
        given = {**fields, "form_token": good}
        for origin in ("cross-site", "same-site"):
            await browser.post(path, given, 403, token=False, **{"sec-fetch-site": origin})
            await browser.post("/sign-in", given, 403, token=False, **{"sec-fetch-site": origin})
            await browser.post("/sign-out", given, 403, token=False, **{"sec-fetch-site": origin})
        other = Browser(browser.service)  # its token is not valid in this session
        if authenticated:
            await sign_in(other, token())
            await other.get("/rule-editor")
            stolen = {**fields, "form_token": other.form_token()}
            await browser.post(path, stolen, 403, token=False)
        answer = await browser.client.post(path, json=given)
        assert answer.status_code == 415
        answer = await browser.client.post(
            path,
            data=b"\xff=%ff",
            headers={"content-type": "application/x-www-form-urlencoded"},
        )
        assert answer.status_code == 400
        triage = browser.service.tools.triage
        assert not triage.current_mute("acme", "mine")
        assert not triage.current_mute("default", "fraud-check")


@pytest.mark.parametrize("operator", [True, False])
async def test_readers_see_everything_and_change_nothing(tmp_path, operator):
    async with tenants(tmp_path) as browser:
        reader = make_token(KEYS["acme"], "acme", time.time(), 600, read_only=True)
        await sign_in(browser, READER if operator else reader)
        scope = "?tenant=acme" if operator else ""
        signal = f"/signals/{signal_id(browser, 'mine', 'acme')}"
        page = await browser.get(signal + scope)
        assert "acmes-secret" in page
        assert "Your token can only read" in page
        assert "/acknowledge" not in page
        assert "/mute" not in page
        assert "New rule" not in await browser.get("/rules" + scope)
        page = await browser.get("/rule-editor" + scope)
        assert 'value="save"' not in page
        checked = {"action": "check", "condition": "a", "id": "new"}
        await browser.post("/rule-editor" + scope, checked, 200)
        saved = {**checked, "action": "save"}
        assert "can only read" in await browser.post("/rule-editor" + scope, saved, 403)
        token = browser.form_token()
        for path in (f"{signal}/acknowledge", "/rules/mine/mute", "/rules/mine/unmute"):
            fields = {"for": "1h", "reason": "x", "form_token": token}
            await browser.post(path + scope, fields, 403, token=False)
        triage = browser.service.tools.triage
        assert triage.current_mute("acme", "mine") is None
        assert [rule.id for rule in browser.service.tools.sources.rules.rules("acme")] == ["mine"]


async def test_signing_out_needs_the_form(tmp_path):
    async with tenants(tmp_path) as browser:
        await sign_in(browser, token())
        await browser.post("/sign-out", {"form_token": "x"}, token=False)
        assert len(browser.service.tools.sources.rules.tenants()) == 1


@pytest.mark.parametrize("path", ["//evil", "/\\evil", "https://evil", "", "evil", "/a b", "/\n"])
def test_only_addresses_of_this_service_are_followed(path):
    assert local(path) is None
    assert local("/signals?a=b&c=%20") == "/signals?a=b&c=%20"


def test_sessions_end_and_are_bounded():
    now = [0.0]
    sessions = Sessions(lambda: now[0])
    first = sessions.open("Bearer 1")
    assert sessions.authorization(first) == "Bearer 1"
    assert sessions.authorization("other") is None
    for k in range(MOST_SESSIONS):
        last = sessions.open(f"Bearer {k}")
    assert sessions.authorization(first) is None
    now[0] = SESSION_SECONDS + 1
    assert sessions.authorization(last) is None


async def test_cookies_are_secure_with_tls_in_front(tmp_path):
    shown = {"address": "off", "public_url": "https://betrace.example"}
    async with browsing(tmp_path, auth=AUTH, api=shown) as browser:
        await sign_in(browser, OPERATOR)
        assert "Secure" in browser.headers["set-cookie"]
