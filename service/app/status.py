"""Health and metrics of a process that is not a query node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from betrace.channels import ThreadRunner
from betrace.service.api.asgi import Receive, Scope, Send, lifespan
from betrace.service.api.metrics.exposition import TEXT_TYPE, Collected, register_process
from betrace.service.api.metrics.listener import header
from betrace.service.tenancy.authentication import Authenticator

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What is shown: the node, its roles, its state, the status of its parts by name, and their
    metrics. The functions are called on the Trio thread. With ``authenticator``, metrics need the
    scrape token."""

    node: str
    roles: tuple[str, ...]
    state: Callable[[], str]
    components: Callable[[], dict[str, Json]]
    metrics: Callable[[], Iterable[Metric]]
    authenticator: Authenticator | None = None


class StatusApp:
    """An ASGI application with ``/livez``, ``/healthz``, ``/readyz`` and ``/metrics``."""

    def __init__(self, status: NodeStatus) -> None:
        self._status = status
        self._started_at = time.time()
        self._process = CollectorRegistry()
        register_process(self._process)
        self._threads = ThreadRunner("metrics", 1)

    def close(self) -> None:
        """End the thread."""
        self._threads.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        status, content_type, body = await self._answer(scope)
        headers = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        headers += [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _answer(self, scope: Scope) -> tuple[int, str, bytes]:
        if scope["method"] not in ("GET", "HEAD"):
            return 405, "text/plain", b"use GET\n"
        match scope["path"]:
            case "/livez" | "/healthz":
                return 200, "application/json", b'{"status":"ok"}'
            case "/readyz":
                return self._ready()
            case "/metrics":
                return await self._metrics(header(scope, b"authorization"))
        text = (
            f"this process has the roles {', '.join(self._status.roles)}: it serves only /livez, "
            "/readyz and /metrics; ask a query node\n"
        )
        return 404, "text/plain", text.encode()

    def _ready(self) -> tuple[int, str, bytes]:
        status = self._status
        ready = status.state() == "ready"
        shown = {
            "status": "ready" if ready else "not ready",
            "node": status.node,
            "roles": status.roles,
            "components": status.components(),
        }
        return 200 if ready else 503, "application/json", orjson.dumps(shown)

    async def _metrics(self, authorization: str | None) -> tuple[int, str, bytes]:
        status = self._status
        if status.authenticator is not None:
            denied = await status.authenticator.scraper(authorization)
            if denied is not None:
                return denied.status, "text/plain", denied.message.encode() + b"\n"
        info = GaugeMetricFamily(
            "betrace_cluster_node_info",
            "1; the labels are the node's name in the cluster and its roles.",
            labels=("node", "roles"),
        )
        info.add_metric([status.node, ",".join(status.roles)], 1)
        start = GaugeMetricFamily(
            "betrace_start_time_seconds", "When the service started.", self._started_at
        )
        families = [info, start, *status.metrics()]
        return 200, TEXT_TYPE, await self._threads.run(self._render, families)

    def _render(self, families: list[Metric]) -> bytes:
        every = Collected(chain(families, self._process.collect()))
        return generate_latest(every)  # type: ignore[arg-type]
