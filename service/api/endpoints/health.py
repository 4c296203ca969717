"""Health, which needs no authentication, metrics, and the listener for metrics alone."""

from __future__ import annotations

from typing import Any

from betrace.channels import ThreadTimeout
from betrace.service.api.asgi import App, Receive, Scope, Send, lifespan
from betrace.service.api.backend import Backend
from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.receiver.responses import ApiError
from betrace.service.tenancy.authentication import Authenticator, Denied

endpoints = Endpoints("Health", access="none")

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SLOW = "the metrics could not be read ({})"


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
    answers={200: "The metrics", 503: "They could not be read in time: the disk does not answer"},
    media_type=EXPOSITION_TYPE,
    access="scrape",
)
async def get_exposition(call: Call) -> Any:
    try:
        return Answer(await call.backend.scrape(), media_type=EXPOSITION_TYPE)
    except ThreadTimeout as error:
        raise ApiError(503, _SLOW.format(error), "look at the disk of the data directory") from None


def metrics_app(backend: Backend, authenticator: Authenticator | None = None) -> App:
    """An ASGI application that serves ``/metrics`` and nothing else."""

    async def denied(scope: Scope) -> Denied | None:
        if authenticator is None:
            return None
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return await authenticator.scraper(given[-1].decode("latin-1") if given else None)

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
        elif (refusal := await denied(scope)) is not None:
            status, media_type, body = (
                refusal.status,
                "text/plain",
                refusal.message.encode() + b"\n",
            )
            headers = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        else:
            try:
                body = await backend.scrape()
            except ThreadTimeout as error:
                status, media_type, body = 503, "text/plain", f"{_SLOW.format(error)}\n".encode()
        headers += [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app
