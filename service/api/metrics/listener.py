"""The listener that serves ``/metrics`` alone."""

from __future__ import annotations

from betrace.channels import ThreadTimeout
from betrace.service.api.asgi import App, Receive, Scope, Send, lifespan
from betrace.service.api.metrics.exposition import Exposition, media_type
from betrace.service.tenancy.authentication import Authenticator, Denied


def metrics_app(exposition: Exposition, authenticator: Authenticator | None) -> App:
    """An ASGI application that serves ``/metrics`` and nothing else."""

    async def denied(scope: Scope) -> Denied | None:
        if authenticator is None:
            return None
        return await authenticator.scraper(header(scope, b"authorization"))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        status, content_type, headers = 200, "text/plain", []
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
                accepted = media_type(header(scope, b"accept") or "")
                body, content_type = await exposition.scrape(accepted), accepted
            except ThreadTimeout as error:
                status, body = 503, f"the metrics could not be read ({error})\n".encode()
        headers += [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return app


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header of a request; the last one if it was sent several times."""
    given = [value for each, value in scope.get("headers", ()) if each == name]
    return given[-1].decode("latin-1") if given else None
