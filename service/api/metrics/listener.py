"""The listener that serves ``/metrics`` alone."""

from __future__ import annotations

from betrace.channels import ThreadTimeout
from betrace.service.api.asgi import App, Receive, Scope, Send, lifespan
from betrace.service.api.metrics.exposition import Exposition
from betrace.service.tenancy.authentication import Authenticator, Denied

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_app(exposition: Exposition, authenticator: Authenticator | None) -> App:
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
        status, media_type, headers = 200, "text/plain", []
        if scope["path"] != "/metrics":
            status, body = 404, b"this port serves only /metrics\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = 405, b"use GET\n"
            headers = [(b"allow", b"GET, HEAD")]
        elif (refusal := await denied(scope)) is not None:
            status, body = refusal.status, refusal.message.encode() + b"\n"
            headers = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        else:
            try:
                body, media_type = await exposition.scrape(), EXPOSITION_TYPE
            except ThreadTimeout as error:
                status, body = 503, f"the metrics could not be read ({error})\n".encode()
        headers += [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app
