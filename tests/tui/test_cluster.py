"""The screen of a cluster."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from betrace.tui.client import ApiClient, ClientError
from tests.support import tui_records as records
from tests.support.tui_fake import URL, FakeApi, piloted, refusal, screen_text, toasts, until


def asked(answer: httpx.Response) -> bool:
    async def ask() -> bool:
        transport = httpx.MockTransport(lambda _: answer)
        async with ApiClient(URL, transport=transport) as client:
            return await client.in_cluster()

    return asyncio.run(ask())


def test_whether_a_service_is_part_of_a_cluster() -> None:
    assert asked(httpx.Response(200, json=records.cluster()))
    assert not asked(refusal(404, "this service is not part of a cluster", "see [cluster]"))
    assert not asked(refusal(403, "not allowed", "use another token"))
    with pytest.raises(ClientError):
        asked(refusal(500, "broken", "report it"))


@piloted()
async def test_without_a_cluster_there_is_no_such_screen(pilot, api):
    await pilot.press("0")
    assert "Cluster" not in screen_text(pilot.app)
    assert pilot.app.panel.TITLE == "Overview"
    assert ("GET", "/api/cluster") not in api.calls


def line(pilot, start: str) -> str:
    return next(each for each in screen_text(pilot.app).splitlines() if each.startswith(start))


@piloted(size=(120, 30), cluster=True)
async def test_it_shows_partitions_and_nodes(pilot, api):
    await pilot.press("0")
    await until(lambda: "evaluator-9" in screen_text(pilot.app))
    text = screen_text(pilot.app)
    assert "4 nodes: 1 edge, 2 evaluators, 1 query node" in text
    assert "draining: evaluator-2" in text
    assert "sent: alerts by query-1" in text
    for state in ("evaluated", "behind", "no owner", "owner gone", "unreadable"):
        assert state in text
    await pilot.press("G", "enter")
    await until(lambda: "OUT_5 has no leader" in screen_text(pilot.app))
    text = screen_text(pilot.app)
    assert "evaluator-2: evaluator, draining" in text
    assert "up to message 51 005 of its log" in text.replace("\N{NARROW NO-BREAK SPACE}", " ")


@piloted(cluster=True)
async def test_it_is_read_again_and_shows_problems(pilot, api: FakeApi):
    await pilot.press("0")
    await until(lambda: "evaluator-9" in screen_text(pilot.app))
    changed = records.cluster()
    changed["partitions"] = changed["partitions"][:1]
    changed["partitions"][0]["owner"] = "evaluator-7"
    changed["rulesProblem"] = "no quorum"
    api.routes["GET", "/api/cluster"] = changed
    api.publish(after=3)
    await until(lambda: "evaluator-7" in screen_text(pilot.app))
    assert "rules are not published" in screen_text(pilot.app)
    api.routes["GET", "/api/cluster"] = refusal(503, "the store is away", "wait")
    await pilot.press("space")
    await until(lambda: bool(toasts(pilot.app)))
    await until(lambda: "not loaded: the store is away" in screen_text(pilot.app))
