"""A fake of the service's API, and a pilot of the TUI for tests.

::

    @piloted()
    async def test_something(pilot, api):
        await pilot.press("3", "R", "y")
        await until(lambda: ("POST", "/api/admin/breakers/ledger/reset") in api.calls)

Tests are synchronous functions, because Textual runs on asyncio and pytest-trio takes async ones.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
from textual.pilot import Pilot

from betrace.tui.app import BetraceApp
from betrace.tui.client import ApiClient
from betrace.tui.state import parse
from tests.support import tui_records as records

T0 = 1_700_000_000.0
"""The time at which tests begin: 2023-11-14 22:13:20 UTC."""

URL = "http://betrace.test:8090"

PATIENCE = 180.0
"""Seconds that a test may wait on a busy machine."""

STAGES = (
    ("span-ingestion", "spans", 10_000, 1),
    ("trace-correlation", "spans", 5_000, 1),
    ("rule-evaluation", "traces", 5_000, 1),
    ("storage-write", "rows", 10_000, 2),
    ("projection", "rows", 40_000, 2),
)

_READING = ("/api/v1/rules/validate", "/api/v1/rules/test")
"""Requests to these paths change nothing."""

Handler = Callable[[httpx.Request], Awaitable[httpx.Response] | httpx.Response]


class Clock:
    """A clock that tests set."""

    def __init__(self, now: float = T0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def snapshot_at(seconds: float) -> dict[str, Any]:
    """The service this many seconds after the start of a load of 12 000 spans/s."""
    spans = int(12_000 * seconds)
    stages = {
        name: {
            "in": spans // 512,
            "out": spans // 512,
            "unit": unit,
            "unitsIn": spans // (1 if unit == "spans" else 8),
            "unitsOut": spans // (1 if unit == "spans" else 8),
            "rate": 12_000.0,
            "latencyMs": {"p50": 1.5, "p95": 3.2, "p99": 4.8 + index},
            "errors": 0,
            "dead": 0,
            "lastError": None,
            "lastProgress": T0,
        }
        for index, (name, unit, _, _) in enumerate(STAGES)
    }
    queues = [
        {
            "name": name,
            "unit": unit,
            "currentSize": capacity // 20,
            "capacity": capacity,
            "utilizationPercent": 5.0,
            "peak": capacity // 10,
            "concurrentConsumers": workers,
            "busyConsumers": 0,
            "waitingSenders": 0,
            "waitingReceivers": workers,
        }
        for name, unit, capacity, workers in STAGES
    ]
    caches = {
        name: {
            "hitCount": int(950 * seconds),
            "missCount": int(50 * seconds),
            "hitRate": 0.95,
            "evictionCount": 3,
            "loadSuccessCount": int(50 * seconds),
            "loadFailureCount": 0,
            "averageLoadPenaltyMs": 2.25,
            "size": size,
            "maxSize": most,
        }
        for name, size, most in (
            ("ruleContainers", 12, 500),
            ("publicKeys", 4, 1000),
            ("traceMetadata", 7300, 10_000),
        )
    }
    components = ["service", "span-log", *(name for name, *_ in STAGES)]
    return {
        "metrics": {
            "windowSeconds": 60,
            "spanIngestionRate": 12_000.0,
            "endToEndP99": 65.4,
            "spansAccepted": spans,
            "spansRefused": {"overloaded": 0, "quota": 0},
            "spansInFlight": 1750,
            "signalsRaised": int(40 * seconds),
            "signalsRetracted": 2,
            "activeTenants": 3,
            "memoryUsageMB": 310.5,
            "uptime": 1000 + seconds,
            "stages": stages,
        },
        "queues": queues,
        "caches": caches,
        "traceWindows": {
            "activeWindows": 7600,
            "longLived": 1,
            "closedKept": 900,
            "totalSpansInMemory": 76_000,
            "memoryBytes": 52_000_000,
            "oldestSeconds": 31.5,
        },
        "system": {
            "memory": {"rssBytes": 310_500_000, "virtualBytes": 1_800_000_000},
            "cpu": {"userSeconds": 100.0 + seconds / 4, "systemSeconds": 10.0, "cores": 2},
            "threads": 12,
            "gc": {"collections": [463, 42, 3]},
            "uptime": 1000 + seconds,
        },
        "breakers": [
            breaker("rule-evaluation"),
            breaker(
                "ledger",
                "open",
                failureRate=0.55,
                retryInSeconds=12.0,
                since=T0 - 3,
                transitions=[
                    {
                        "at": T0 - 3,
                        "before": "closed",
                        "after": "open",
                        "reason": "55 % of 60 calls failed",
                    }
                ],
            ),
            breaker("duckdb"),
        ],
        "pipeline": {
            "ingestion": "open",
            "drained": False,
            "waiting": {"span-ingestion": 500},
            "stages": {name: "working" for name, *_ in STAGES},
        },
        "ready": True,
        "components": {
            **{name: {"status": "ok", "detail": "working"} for name in components},
            "breaker-ledger": {"status": "degraded", "detail": "open"},
        },
    }


def breaker(name: str, state: str = "closed", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "since": None,
        "failureRate": 0.0,
        "slowCallRate": 0.0,
        "windowCalls": 60,
        "trialsLeft": 0,
        "retryInSeconds": 0.0,
        "running": 0,
        "calls": {"successful": 100, "failed": 33, "timed_out": 0, "slow": 1, "not_permitted": 5},
        "settings": {
            "timeoutSeconds": 5,
            "failureRate": 0.5,
            "slowCallRate": 1.0,
            "slowCallSeconds": 2.5,
            "windowCalls": 100,
            "minimumCalls": 50,
            "openSeconds": 15,
            "halfOpenCalls": 10,
        },
        "transitions": [],
        **more,
    }


class FakeApi:
    """Answers like the service. `data` is its snapshot; `publish` sends one on the stream.
    `routes` maps (method, path) to JSON, a response, or a function that makes one."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.data = snapshot_at(60)
        self.calls: list[tuple[str, str]] = []
        self.requests: list[httpx.Request] = []
        self.down = False
        self.streaming = True
        self.routes: dict[tuple[str, str], Any] = {}
        self.streams: set[asyncio.Queue[bytes | None]] = set()
        self.tails: set[asyncio.Queue[bytes | None]] = set()
        """Streams of signals."""

    # For tests

    def publish(self, data: dict[str, Any] | None = None, after: float = 1.0) -> None:
        """Send a snapshot on the stream, ``after`` seconds later."""
        self.clock.now += after
        self.data = data or self.data
        text = f"event: snapshot\ndata: {json.dumps(self.data)}\n\n".encode()
        for stream in self.streams:
            stream.put_nowait(text)

    def go_away(self) -> None:
        """Close all connections and accept no more."""
        self.down = True
        for stream in self.streams | self.tails:
            stream.put_nowait(None)

    def raise_signal(self, signal: dict[str, Any]) -> None:
        """Send a signal on the streams of signals."""
        text = f"id: {signal['id']}\nevent: signal\ndata: {json.dumps(signal)}\n\n".encode()
        for stream in self.tails:
            stream.put_nowait(text)

    def posted(self) -> list[str]:
        """The paths, with queries, of all requests that change something."""
        return [
            request.url.raw_path.decode()
            for request in self.requests
            if request.method != "GET" and request.url.path not in _READING
        ]

    def sent(self, path: str) -> dict[str, Any]:
        """The body of the last request to a path."""
        last = [each for each in self.requests if each.url.path == path and each.content][-1]
        return dict(json.loads(last.content))

    def app(self, read_only: bool = False, history: int = 30, cluster: bool = False) -> BetraceApp:
        """The application with a history of this many seconds."""
        if cluster:
            self.routes["GET", "/api/cluster"] = records.cluster()
        client = ApiClient(URL, transport=httpx.MockTransport(self._handle))
        app = BetraceApp(client, read_only, clock=self.clock, cluster=cluster)
        for second in range(history, 0, -1):
            data = snapshot_at(60 - second)
            data["metrics"]["spansAccepted"] += 700 * (second % 7)
            app.state.update(parse(data, T0 - second))
        return app

    # The service

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.path
        self.calls.append((request.method, path))
        if self.down:
            raise httpx.ConnectError("connection refused", request=request)
        answer = self.routes.get((request.method, path))
        if answer is None:
            answer = self._answer(request.method, path)
        if callable(answer):
            answer = answer(request)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, httpx.Response):
            return answer
        if answer is None:
            return refusal(404, f"there is nothing at {path}", "see /docs")
        return httpx.Response(200, json=answer)

    def _answer(self, method: str, path: str) -> Any:
        data = self.data
        if method == "GET" and path == "/api/v1/signals/stream":
            return httpx.Response(200, content=self._stream(self.tails))
        if (found := records.answer(method, path)) is not None:
            return found
        if method == "GET":
            if path == "/api/performance/stream":
                if not self.streaming:
                    return refusal(503, "16 streams are open already", "close one")
                return httpx.Response(200, content=self._stream(self.streams))
            return {
                "/api/performance/metrics": data["metrics"],
                "/api/performance/queue-stats": {"queues": data["queues"]},
                "/api/performance/cache-stats": data["caches"],
                "/api/performance/trace-windows": data["traceWindows"],
                "/api/performance/system-stats": data["system"],
                "/api/admin/breakers": {"breakers": data["breakers"]},
                "/api/admin/pipeline": data["pipeline"],
                "/readyz": {"status": "ready", "components": data["components"]},
            }.get(path)
        return self._act(path)

    def _act(self, path: str) -> Any:
        self.data = data = copy.deepcopy(self.data)
        *_, target, action = path.split("/")
        if path.startswith("/api/admin/pipeline/"):
            data["pipeline"]["ingestion"] = "open" if action == "resume" else "paused"
            data["pipeline"]["drained"] = action == "drain"
            return data["pipeline"]
        if path.startswith("/api/admin/breakers/"):
            found = next(each for each in data["breakers"] if each["name"] == target)
            states = {"trip": "open", "reset": "closed", "force-open": "forced_open"}
            found["state"] = states.get(action, "disabled")
            return found
        if path.startswith("/api/performance/cache-invalidate/"):
            return {"cache": action, "invalidated": data["caches"][action]["size"]}
        if path == "/api/admin/cache-warmup":
            return {"tenants": 2, "loaded": 3, "failed": 1, "seconds": 0.1}
        return None

    async def _stream(self, streams: set[asyncio.Queue[bytes | None]]) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        streams.add(queue)
        try:
            yield b": connected\n\n"
            while (part := await queue.get()) is not None:
                yield part
        finally:
            streams.discard(queue)
        raise httpx.ReadError("connection reset")


def refusal(status: int, message: str, hint: str) -> httpx.Response:
    """An error in the format of the service."""
    return httpx.Response(
        status, json={"error": {"code": "refused", "message": message, "hint": hint}}
    )


PilotTest = Callable[[Pilot[int], FakeApi], Awaitable[None]]


def piloted(
    size: tuple[int, int] = (80, 24),
    read_only: bool = False,
    cluster: bool = False,
    **api: Any,
) -> Callable[[PilotTest], Callable[[], None]]:
    """Run a test with a pilot of the TUI; ``api`` are attributes of the `FakeApi`."""

    def decorate(test: PilotTest) -> Callable[[], None]:
        async def drive() -> None:
            fake = FakeApi()
            for name, value in api.items():
                setattr(fake, name, value)
            app = fake.app(read_only, cluster=cluster)
            notify = app.notify  # toasts stay, however long the machine takes
            app.notify = lambda *args, **more: notify(*args, **more | {"timeout": 600})
            async with (
                asyncio.timeout(PATIENCE),
                app.run_test(size=size, notifications=True) as pilot,
            ):
                if not fake.down:
                    await until(lambda: app.connection.link.status == "connected")
                await pilot.pause()
                await test(pilot, fake)
            await app.client.close()

        def run() -> None:
            asyncio.run(drive())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__module__ = test.__module__
        return run

    return decorate


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until the application has fulfilled a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            with suppress(TimeoutError):
                await asyncio.sleep(0.01)


def screen_text(app: BetraceApp) -> str:
    """The visible screen as lines of text."""
    size = app.size
    lines = app.screen._compositor.render_strips(size)
    return "\n".join(strip.text.rstrip() for strip in lines)


def toasts(app: BetraceApp) -> list[tuple[str, str]]:
    """Titles and messages of the visible toasts."""
    return [(note.title, note.message) for note in app._notifications]
