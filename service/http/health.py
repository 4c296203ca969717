"""Health and metrics, which need no authentication, and the listener for metrics alone."""

from __future__ import annotations

from typing import Any

from service.http.asgi import App, Receive, Scope, Send, lifespan
from service.http.backend import Backend
from service.http.endpoint import Answer, Call, Endpoints

endpoints = Endpoints("Health", access="none")

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@endpoints.add("GET", "/livez", "Whether the process lives", answers={200: '`{"status": "ok"}`'})
@endpoints.add("GET", "/healthz", "The same as /livez", answers={200: '`{"status": "ok"}`'})
async def get_live(call: Call) -> Any:
    return {"status": "ok"}


@endpoints.add(
    "GET",
    "/readyz",
    "Whether requests should be sent here",
    answers={
        200: '`{"status": "ready", "components": {name: {"status", "detail"}}}`',
        503: "The same with `not ready`: it starts, or it drains",
    },
)
async def get_ready(call: Call) -> Any:
    """A component's status is starting, ok, degraded, failed or stopping."""
    ready = call.backend.ready
    return Answer(
        {
            "status": "ready" if ready else "not ready",
            "components": dict(call.backend.components()),
        },
        200 if ready else 503,
    )


@endpoints.add(
    "GET",
    "/metrics",
    "Metrics in Prometheus' text format",
    answers={200: "The metrics"},
    media_type=EXPOSITION_TYPE,
)
async def get_exposition(call: Call) -> Any:
    return Answer(call.backend.metrics_exposition(), media_type=EXPOSITION_TYPE)


def metrics_app(backend: Backend) -> App:
    """An ASGI application that serves ``/metrics`` and nothing else."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        status, media_type, headers = 200, EXPOSITION_TYPE, []
        if scope["path"] != "/metrics":
            status, media_type, body = 404, "text/plain", b"there is only /metrics here\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, media_type, body = 405, "text/plain", b"use GET\n"
            headers = [(b"allow", b"GET, HEAD")]
        else:
            body = backend.metrics_exposition()
        headers += [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app
