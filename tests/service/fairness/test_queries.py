"""One tenant asks for much at the API; the others must not notice."""

from __future__ import annotations

import random
import time
from functools import partial

import httpx
import pytest
import trio

from betrace.service.api import app as api_app
from betrace.service.api import trace_view
from betrace.service.api.app import create_api
from betrace.service.api.asgi import serve
from betrace.service.api.body_shares import OPERATOR, UNKNOWN, BodyShares, caller_of
from betrace.service.api.endpoints import rules as rule_endpoints
from betrace.service.api.errors import ApiError
from betrace.service.api.turns import TenantTurns
from betrace.service.otlp.render import trace_as_json
from tests.support.api_client import ApiClient
from tests.support.api_records import otlp, span
from tests.support.inprocess import (
    closed,
    folded,
    opened,
    running,
    send,
    settings,
    write_rules,
)
from tests.support.spans import TRACE, S

EXPENSIVE = " or ".join(f'x matches "[ab]*a[ab]{{{250 - n}}}c"' for n in range(40))


@pytest.mark.slow
@pytest.mark.kernel
async def test_tests_of_expensive_rules_delay_only_their_own_tenant(tmp_path, monkeypatch):
    monkeypatch.setattr(rule_endpoints, "TRIAL_SECONDS", 0.05)
    text = "".join(random.Random(1).choices("ab", k=60_000))
    sent = span("a", 1)
    sent["attributes"] = [{"key": "x", "value": {"stringValue": text}}]
    trace = otlp(sent)
    body = {"condition": f"a.where({EXPENSIVE})", "trace": trace}
    with opened(settings(tmp_path, api={"query_timeout_seconds": 60})) as service:
        client = ApiClient(service)
        answers: list[str] = []
        done = False
        cheap = {"condition": "a", "trace": trace}  # loads what takes long the first time
        await client.post("/api/v1/rules/test", 200, cheap, X_Scope_OrgID="quiet")

        async def ask() -> None:
            while not done:  # a cancelled call would break the test client
                try:
                    error = await client.post(
                        "/api/v1/rules/test", 400, body, X_Scope_OrgID="noisy"
                    )
                    answers.append(error["message"])
                except AssertionError as refused:  # 503
                    answers.append(str(refused))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask)
                for _ in range(5):
                    await client.get("/api/v1/rules", X_Scope_OrgID="quiet")
                while not any("processor time" in answer for answer in answers):
                    assert service.tools.computing.statistics().running <= 1  # of 2
                    await trio.sleep(0.01)
                await client.get("/api/v1/rules", X_Scope_OrgID="quiet")
                done = True


@pytest.mark.kernel
async def test_a_trace_is_shown_without_verdicts_that_take_too_much_time(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_view, "TRIAL_SECONDS", 0.05)
    text = "".join(random.Random(1).choices("ab", k=16_000))
    write_rules(tmp_path, {"slow": f"a.where({EXPENSIVE})", "cheap": "count(a) > 9"}, "noisy")
    write_rules(tmp_path, {"cheap": "count(a) > 9"}, "quiet")
    async with running(settings(tmp_path)) as service:
        for tenant in ("noisy", "quiet"):
            await send(service, [S(1, x=text), S(2, x=text[1:])], tenant=tenant)
            await send(service, [S(3, x=text[2:])], tenant=tenant)
        await folded(service)
        client = ApiClient(service)
        path = f"/api/v1/traces/{TRACE.hex()}"
        shown = await client.get(path, X_Scope_OrgID="noisy")
        (resource,) = shown["resourceSpans"][:1]
        assert resource["scopeSpans"][0]["spans"]
        assert shown["missing"] == shown["omittedSpans"] == 0
        for rule in ("slow", "cheap"):
            verdict = shown["verdicts"][rule]
            assert verdict["verdict"] == "unknown"
            assert "processor time" in verdict["undecided"]
        monkeypatch.setattr(trace_view, "TRIAL_SECONDS", 3600)
        quiet = await client.get(path, X_Scope_OrgID="quiet")
        assert quiet["verdicts"]["cheap"]["verdict"] in ("open", "kept")
        assert "undecided" not in quiet["verdicts"]["cheap"]


async def test_eight_readers_of_a_long_trace_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_view, "MAX_SPANS", 50)
    reading = most = 0

    def counted(*given):
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        time.sleep(0.02)
        shown = trace_as_json(*given)
        reading -= 1
        return shown

    monkeypatch.setattr(trace_view, "trace_as_json", counted)
    async with running(settings(tmp_path)) as service:
        for first in range(0, 200, 20):
            await send(service, [S(first + n) for n in range(1, 21)], tenant="noisy")
        await send(service, [S(1)], tenant="quiet")
        await folded(service)
        await closed(service)
        client = ApiClient(service)
        path = f"/api/v1/traces/{TRACE.hex()}"
        found = []

        async def read() -> None:
            found.append(await client.get(path, X_Scope_OrgID="noisy"))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(read)
            await client.get(path, X_Scope_OrgID="quiet")
        assert len(found) == 8
        for trace in found:
            assert trace["omittedSpans"] == 150
            assert len(str(trace["resourceSpans"])) < 100_000
        assert most <= 2  # a long one, and the quiet tenant's


async def test_an_abandoned_call_keeps_its_turn(autojump_clock):
    turns = TenantTurns(2)
    end = await turns.take("a", 1)
    with pytest.raises(trio.TooSlowError):
        await turns.take("a", 1)
    (await turns.take("b", 1))()
    (await turns.take("", 1))()
    (await turns.take("", 1))()
    end()
    end()  # once is enough
    await trio.sleep(0)
    await turns.take("a", 1)
    with pytest.raises(trio.TooSlowError):
        await turns.take("a", 1)


async def test_streams_of_one_tenant_leave_some_for_others_and_for_operators(tmp_path):
    with opened(settings(tmp_path, api={"max_streams": 20})) as service:
        from betrace.service.api.endpoint import Call

        def stream(tenant: str):
            call = Call(service.tools, tenant, {}, {}, b"", "")

            async def parts():
                await trio.sleep_forever()
                yield b""

            return call.stream(parts).body

        opened_streams = []

        async def open_one(tenant: str) -> None:
            body = stream(tenant)
            await body.__anext__()
            opened_streams.append(body)

        for _ in range(10):
            await open_one("noisy")
        with pytest.raises(ApiError, match="10 streams"):
            stream("noisy")
        for number in range(8):
            await open_one(f"t{number}")
        with pytest.raises(ApiError):
            stream("another")
        await open_one("")  # an operator
        for body in opened_streams:
            await body.aclose()
        assert service.tools.streams.total() == 0


async def test_bodies_of_the_api_are_bounded_together(tmp_path, monkeypatch, nursery):
    monkeypatch.setattr(api_app, "BodyShares", partial(BodyShares, 6_000_000))
    with opened(settings(tmp_path)) as service:
        app = create_api(service.tools, None, frozenset())
        shutdown = trio.Event()
        url = await nursery.start(partial(serve, app, "127.0.0.1:0", shutdown, grace_seconds=1))
        host, port = url.removeprefix("http://").split(":")
        head = b"PUT /api/v1/rules/a HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n"
        unfinished = [await trio.open_tcp_stream(host, int(port)) for _ in range(3)]
        await unfinished[0].send_all(head + bytes(1_500_000))
        await trio.sleep(0.2)
        await unfinished[1].send_all(head + bytes(1_400_000))
        await trio.sleep(0.2)
        await unfinished[2].send_all(head + bytes(150_000))
        with trio.fail_after(60):
            assert b"503" in await unfinished[2].receive_some()
        async with httpx.AsyncClient() as client:  # the others do not notice
            answer = await client.put(
                url + "/api/v1/rules/a",
                content=b'{"condition": "' + bytes(1_500_000),
                headers={"x-scope-orgid": "quiet"},
            )
            assert answer.status_code == 400, answer.text
            answer = await client.post(url + "/api/admin/tenants", json={"tenant": "made"})
            assert answer.status_code == 201, answer.text
        for stream in unfinished:
            await trio.aclose_forcefully(stream)
        async with httpx.AsyncClient() as client:

            async def small() -> bool:
                answer = await client.put(
                    url + "/api/v1/rules/a", content=b'{"condition": "' + bytes(500_000)
                )
                return answer.status_code == 400  # not JSON

            with trio.fail_after(60):
                while not await small():
                    await trio.sleep(0.05)
        shutdown.set()


def test_a_tenant_may_have_half_and_operators_the_last_eighth():
    shares = BodyShares(80)
    shares.take("a", 40)
    assert shares.admits("a")
    shares.take("a", 1)
    assert not shares.admits("a")
    assert shares.admits("b")
    shares.take("b", 29)
    assert shares.admits("b")
    shares.take("c", 1)
    assert not shares.admits("c")
    shares.take(OPERATOR, 9)
    assert shares.admits(OPERATOR)
    shares.take(OPERATOR, 1)
    assert not shares.admits(OPERATOR)
    shares.release("a", 41)
    assert shares.admits(OPERATOR)
    assert shares.admits("c")
    assert "a" not in shares.used


async def test_whose_share_a_body_uses(tmp_path):
    def asked(path: str = "/api/v1/rules/a", **headers: str):
        pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        return {"type": "http", "path": path, "headers": pairs}

    assert await caller_of(asked(), None, ()) == "default"
    assert await caller_of(asked(x_scope_orgid="acme"), None, ()) == "acme"
    assert await caller_of(asked(x_scope_orgid="gone"), None, {"gone"}) == UNKNOWN
    assert await caller_of(asked(x_scope_orgid="No Name"), None, ()) == UNKNOWN
    assert await caller_of(asked("/api/admin/tenants"), None, ()) == OPERATOR
    secret = "an operator's token of the test"
    auth = {"enabled": True, "operator_token": secret}
    with opened(settings(tmp_path, auth=auth)) as service:
        guard = service.gate.authenticator
        assert await caller_of(asked(x_scope_orgid="acme"), guard, ()) == UNKNOWN
        assert await caller_of(asked(authorization="Bearer x.y.z"), guard, ()) == UNKNOWN
        assert await caller_of(asked(authorization=f"Bearer {secret}"), guard, ()) == OPERATOR
