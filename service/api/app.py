"""The API: queries, operation, health and documentation, as a Quart application.

For each request it identifies the caller, checks the parameters, calls the handler of the endpoint
(:mod:`betrace.service.api.endpoint`), and writes what the handler returns or raises.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Container
from typing import Any

import orjson
import trio
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from betrace.service.api.asgi import App, Receive, Scope, Send
from betrace.service.api.body_shares import BodyShares, bounded
from betrace.service.api.endpoint import APPLIED_HEADER, Answer, Call, Endpoint, Tools
from betrace.service.api.errors import ApiError, translate
from betrace.service.api.openapi import all_endpoints
from betrace.service.api.pages.routes import add_pages
from betrace.service.api.params import near, read_param, read_params
from betrace.service.tenancy.authentication import (
    Authenticator,
    Denied,
    claimed_tenant,
    closed_tenant,
)

_log = logging.getLogger("service.http")

_BODY_SECONDS = 30
_HINTS = {
    413: "send less, or raise api.max_body_bytes",
    408: "send the body faster",
}


def create_api(
    tools: Tools, authenticator: Authenticator | None, closed: Container[str]
) -> QuartTrio:
    """The application. Without ``authenticator``, callers are who they say they are. ``closed``
    are the deleted tenants."""
    app = QuartTrio("service.http", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = tools.sources.settings.api.max_body_bytes
    app.config["BODY_TIMEOUT"] = _BODY_SECONDS
    app.config["RESPONSE_TIMEOUT"] = None  # handlers have timeouts; streams may go on for ever
    listed = all_endpoints()
    for number, endpoint in enumerate(listed):
        app.add_url_rule(
            endpoint.path.replace("{", "<").replace("}", ">"),
            endpoint=f"{number}",
            view_func=_view(endpoint, tools, authenticator, closed),
            methods=[endpoint.method],
            provide_automatic_options=False,
        )
    show_error = add_pages(app, tools, authenticator, closed)
    paths = {endpoint.path for endpoint in listed}

    @app.errorhandler(HTTPException)
    async def unmatched(error: HTTPException) -> Response:
        status = error.code or 500
        if status == 404:
            nothing = f"there is nothing at {request.path[:200]}"
            if "text/html" in request.headers.get("accept", ""):
                return await show_error(ApiError(404, nothing))
            return _error(ApiError(404, nothing, _nearby(paths)))
        if status == 405:
            allowed = sorted(getattr(error, "valid_methods", None) or [])
            return _error(
                ApiError(
                    405,
                    f"{request.method} is not allowed on {request.path[:200]}",
                    f"use {' or '.join(allowed)}",
                    {"allow": ", ".join(allowed)},
                )
            )
        return _error(ApiError(status, str(error.description), _HINTS.get(status, "see /docs")))

    app.asgi_app = bounded(  # type: ignore[assignment,method-assign]
        _finishing(app.asgi_app), BodyShares(), authenticator, closed
    )
    return app


def _finishing(app: Callable[..., Awaitable[None]]) -> App:
    """Shield the sending of the last part of a response. Hypercorn reports the disconnect to the
    application while it ends the response, and Quart-Trio then cancels the sending task:
    connections that should close stayed open, and kept ones lost their timeout."""

    async def finishing(scope: Scope, receive: Receive, send: Send) -> None:
        async def whole(message: dict[str, Any]) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            with trio.CancelScope(shield=last):
                await send(message)

        await app(scope, receive, whole)

    return finishing


def _nearby(paths: set[str]) -> str:
    hint = near(request.path, paths)
    return hint if hint.startswith("did") else "see /docs for all paths"


def _view(
    endpoint: Endpoint, tools: Tools, authenticator: Authenticator | None, closed: Container[str]
) -> Callable[..., Awaitable[Response]]:
    path_params = {param.name: param for param in endpoint.path_params}

    async def view(**path: str) -> Response:
        try:
            tenant = await _caller(endpoint, authenticator, closed)
            params = read_params(endpoint.params, request.args.items(multi=True))
            for name, text in path.items():
                params[name] = read_param(path_params[name], text)
            body: bytes = b""
            if endpoint.body is not None:
                body = await request.get_data(False, False, False)
            headers = {name.lower(): value for name, value in request.headers.items()}
            client = request.remote_addr or ""
            call = Call(tools, tenant, params, headers, body, client)
            applied = _applied(endpoint, tools)  # first: the answer may lack later ones
            response = _write(await endpoint.handler(call))
            response.headers.update(applied)
            return response
        except ApiError as error:
            return _error(error)
        except HTTPException:  # the body was too large or too slow
            raise
        except Exception as error:
            known = translate(error)
            if known is not None:
                return _error(known)
            _log.exception("%s %s failed", endpoint.method, endpoint.path)
            hint = "this is a bug, and the service's log has the details; try again later"
            return _error(ApiError(500, "the service failed to answer this request", hint))

    return view


def _applied(endpoint: Endpoint, tools: Tools) -> dict[str, str]:
    """At a query node of a cluster, the header that says how far each partition is applied."""
    node = tools.sources.node
    if node is None or endpoint.access != "tenant" or not endpoint.reads:
        return {}
    return {APPLIED_HEADER: node.applied()}


async def _caller(
    endpoint: Endpoint, authenticator: Authenticator | None, closed: Container[str]
) -> str:
    """The tenant; empty for operators and for public endpoints."""
    if endpoint.access == "none":
        return ""
    authorization, scope = _header("authorization"), _header("x-scope-orgid")
    caller: str | Denied | None = ""
    if endpoint.access == "tenant":
        if authenticator is not None:
            caller = await authenticator.caller(authorization, scope, reads=endpoint.reads)
        else:
            caller = claimed_tenant(scope)
        if isinstance(caller, str) and caller in closed:
            caller = closed_tenant(caller)
    elif authenticator is not None:
        if endpoint.access == "scrape":
            caller = await authenticator.scraper(authorization)
        else:
            caller = await authenticator.operator(authorization, reads=endpoint.reads)
    if isinstance(caller, Denied):
        headers = {"www-authenticate": "Bearer"} if caller.status == 401 else {}
        raise ApiError(caller.status, caller.message, "see /docs", headers)
    return caller or ""


def _header(name: str) -> str | None:
    """A header of the request; several values give one that is no token or tenant."""
    values = request.headers.getlist(name)
    return ", ".join(values) if values else None


def _write(result: Any) -> Response:
    answer = result if isinstance(result, Answer) else Answer(result)
    body = answer.body
    if isinstance(body, dict | list):
        body = orjson.dumps(body)
    response = Response(body, answer.status, content_type=answer.media_type)
    response.headers.update(answer.headers)
    response.headers.setdefault("x-content-type-options", "nosniff")
    return response


def _error(error: ApiError) -> Response:
    return _write(Answer(error.body(), error.status, headers=error.headers))
