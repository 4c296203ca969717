"""The API's documentation, made from its endpoints: ``/openapi.json``, the page at ``/docs``, and
``docs/http-api.md`` (``python -m betrace.service.api.openapi`` prints it; a test compares)."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from itertools import groupby
from typing import Any

from betrace.service.api.endpoint import HTML_TYPE, JSON_TYPE, Answer, Call, Endpoint, Endpoints
from betrace.service.api.endpoints import admin, health, performance, rules, signals, tenants

endpoints = Endpoints("Documentation", access="none")

INTRODUCTION = """\
Times are RFC 3339 with nanoseconds, ids lower-case hex. Parameters that are times also take an
integer of nanoseconds since 1970, or a time ago such as `-15m`. An unknown parameter is an error.

The tenant is that of the bearer token; for an operator it is the one that the header
`X-Scope-OrgID` names. With authentication off it is named by that header, else it is `default`; a
name is `[a-z0-9][a-z0-9_-]{0,62}`. A tenant that is deleted gets 403.

An error is `{"error": {"code", "message", "hint"}}`: what is wrong, and what to do about it.
"""
INGESTION = """\
## Ingestion

On a listener of its own (`ingest.address`, 127.0.0.1:4318), OTLP over HTTP as its specification
says.

### `POST /v1/traces`

Also `/api/otlp/traces`. The body is an `ExportTraceServiceRequest` as `application/x-protobuf` or
`application/json`, with `Content-Encoding` `gzip`, `zstd`, `deflate` or none. The answer is in the
same type; every error is a `google.rpc.Status` whose message says what to do.

| status | meaning |
|---|---|
| 200 | The spans are in the span log. `partial_success` says how many were rejected, and why |
| 400 | The body cannot be decoded, or `X-Scope-OrgID` names no tenant. Do not send it again |
| 401, 403 | With authentication on: there is no valid token, or it is not for this |
| 404, 405 | Another path, another method |
| 413 | The body is larger than `ingest.max_body_bytes` before or after decompression |
| 408, 431 | The headers are slow (`ingest.head_timeout_seconds`), or more than 100 or 32 KiB |
| 415 | The content type or encoding is not one of the above |
| 429 | The tenant is over its quota; send again after `Retry-After` |
| 503 | Overloaded, paused, draining, or the log cannot be written; send again after `Retry-After` |

`Retry-After` is a whole number of seconds, from 1 to 5, and grows with the overload. A request
whose answer was lost may have been accepted: sending it again is safe, since a span sent twice
counts once. A body that arrives slower than `ingest.body_timeout_seconds` gets 503.

Logs and metrics (`/v1/logs`, `/v1/metrics`) get 404 with the variable that turns them off, and are
counted apart. Pages of the origins in `ingest.cors_origins` may send too: preflights are answered,
and `Retry-After` is readable for them.

HTTP/1.1, in the strict form of RFC 9112: a request whose length can be disputed is a 400, and ends
its connection. HTTP/1.0 is answered and the connection ended; anything else is a 505. HTTP/2 is
spoken with `ingest.server = "hypercorn"` and TLS only; a gRPC client on this port is told the
other one.

### OTLP over gRPC

On a listener of its own (`ingest.grpc_address`, 127.0.0.1:4317, or off):
`opentelemetry.proto.collector.trace.v1.TraceService/Export`, with the same admission, and
`grpc.health.v1.Health`. Statuses, limits and clients are in docs/clients.md.
"""
_GENERAL = {
    "tenant": {
        400: "A parameter or the body is wrong",
        401: "With authentication on: the bearer token is missing or not valid",
        403: "The token is not for this",
        503: "The query took too long, or too many streams are open",
    },
    "operator": {
        400: "A parameter or the body is wrong",
        401: "With authentication on: the operator token is missing",
        403: "The token is not that of an operator",
    },
    "scrape": {
        400: "A parameter is wrong",
        401: "With authentication on: the scrape or the operator token is missing",
        403: "The token is neither of them",
    },
    "none": {400: "A parameter is wrong"},
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "hint"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "hint": {"type": "string"},
                "errors": {"type": "array", "items": {"type": "object"}},
            },
        }
    },
}


def all_endpoints() -> list[Endpoint]:
    """All endpoints of the API, in the order of the documentation."""
    modules = (signals, rules, performance, admin, tenants, health)
    return [item for module in modules for item in module.endpoints.all] + endpoints.all


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in all_endpoints():
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "BeTrace", "version": version("betrace"), "description": INTRODUCTION},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR_SCHEMA},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    described = [(param, "query", False) for param in endpoint.params]
    described += [(param, "path", True) for param in endpoint.path_params]
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__ + _suffix(endpoint),
        "tags": [endpoint.tag],
        "parameters": [
            {
                "name": param.name,
                "in": place,
                "required": required,
                "description": param.description,
                "schema": dict(param.schema),
            }
            for param, place, required in described
        ],
        "responses": {
            str(code): _response(endpoint, code, text) for code, text in _codes(endpoint)
        },
    }
    if endpoint.access == "tenant":
        operation["parameters"].append(
            {
                "name": "X-Scope-OrgID",
                "in": "header",
                "required": False,
                "description": "The tenant, with authentication off or for an operator.",
                "schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,62}$"},
            }
        )
    if endpoint.access != "none":
        operation["security"] = [{}, {"token": []}]
    if endpoint.description:
        operation["description"] = endpoint.description
    if endpoint.body is not None:
        content = {JSON_TYPE: {"schema": endpoint.body}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _suffix(endpoint: Endpoint) -> str:
    """Endpoints that share a handler still need ids of their own."""
    sharing = [e.path for e in all_endpoints() if e.handler is endpoint.handler]
    return f"_{sharing.index(endpoint.path)}" if sharing.index(endpoint.path) else ""


def _codes(endpoint: Endpoint) -> list[tuple[int, str]]:
    return sorted((_GENERAL[endpoint.access] | endpoint.answers).items())


def _response(endpoint: Endpoint, code: int, text: str) -> dict[str, Any]:
    if code == 204:
        return {"description": text}
    if code < 300:
        schema = {} if endpoint.media_type == JSON_TYPE else {"type": "string"}
        return {"description": text, "content": {endpoint.media_type: {"schema": schema}}}
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": text, "content": {JSON_TYPE: {"schema": schema}}}


def markdown() -> str:
    """The text of ``docs/http-api.md``."""
    lines = [
        "# HTTP interface",
        "",
        "Made by `python -m betrace.service.api.openapi > docs/http-api.md`.",
        "",
        INGESTION,
        "## Everything else",
        "",
        "On the listener at `api.address` (127.0.0.1:8090); `/metrics` also on `metrics.address`.",
        "",
        INTRODUCTION,
    ]
    for tag, members in groupby(all_endpoints(), key=lambda endpoint: endpoint.tag):
        lines += [f"## {tag}", ""]
        for endpoint in members:
            lines += _section(endpoint)
    return "\n".join(lines).rstrip() + "\n"


def _section(endpoint: Endpoint) -> Iterable[str]:
    yield from (f"### `{endpoint.method} {endpoint.path}`", "")
    yield from (f"{endpoint.summary}. {endpoint.description}".rstrip(), "")
    params = [*endpoint.path_params, *endpoint.params]
    if params:
        yield from ("| parameter | meaning |", "|---|---|")
        for param in params:
            yield f"| `{param.name}` | {param.description}{_values(param.schema)} |"
        yield ""
    if endpoint.body is not None:
        needed = endpoint.body.get("required", [])
        fields = (f"`{n}`" + ("" if n in needed else "?") for n in endpoint.body["properties"])
        yield from (f"Body: a JSON object with {', '.join(fields)} (`?`: optional).", "")
    yield from ("| status | meaning |", "|---|---|")
    for code, text in sorted(endpoint.answers.items()):
        yield f"| {code} | {text} |"
    yield ""


def _values(schema: Any) -> str:
    if "enum" in schema:
        return f" One of {', '.join(f'`{value}`' for value in schema['enum'])}."
    if "maximum" in schema:
        return f" {schema['minimum']} to {schema['maximum']}, default {schema['default']}."
    return ""


def page() -> str:
    """The page at ``/docs``: all endpoints on one page without external parts."""
    body: list[str] = []
    for tag, members in groupby(all_endpoints(), key=lambda endpoint: endpoint.tag):
        body.append(f"<h2>{html.escape(tag)}</h2>")
        body.extend(_block(endpoint) for endpoint in members)
    intro = "".join(f"<p>{_inline(part)}</p>" for part in INTRODUCTION.split("\n\n"))
    return _PAGE.replace("INTRODUCTION", intro).replace("ENDPOINTS", "\n".join(body))


def _block(endpoint: Endpoint) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(param.name)}</code></td>"
        f"<td>{_inline(param.description + _values(param.schema))}</td></tr>"
        for param in (*endpoint.path_params, *endpoint.params)
    )
    answers = "".join(
        f"<tr><td>{code}</td><td>{_inline(text)}</td></tr>" for code, text in _codes(endpoint)
    )
    return (
        f"<details><summary><b>{endpoint.method}</b> <code>{html.escape(endpoint.path)}</code> "
        f"{_inline(endpoint.summary)}</summary><p>{_inline(endpoint.description)}</p>"
        + (f"<h4>Parameters</h4><table>{rows}</table>" if rows else "")
        + f"<h4>Answers</h4><table>{answers}</table></details>"
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text.strip(), quote=False))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>BeTrace API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
details { border: 1px solid #8886; border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 4.5rem; }
table { border-collapse: collapse; } td { padding: .15rem .8rem .15rem 0; vertical-align: top; }
h4 { margin: .8rem 0 .2rem; }
</style></head><body>
<h1>BeTrace API</h1>
INTRODUCTION
<p>The machine-readable form is <a href="/openapi.json">openapi.json</a>.</p>
ENDPOINTS
</body></html>
"""


@endpoints.add("GET", "/openapi.json", "The OpenAPI document", answers={200: "The document"})
async def get_openapi(call: Call) -> Any:
    return openapi()


@endpoints.add("GET", "/docs", "The API on a page", answers={200: "The page"}, media_type=HTML_TYPE)
async def get_docs(call: Call) -> Any:
    return Answer(page().encode(), media_type=HTML_TYPE)


@endpoints.add("GET", "/", "Leads to /docs", answers={302: "`Location: /docs`"})
async def get_root(call: Call) -> Any:
    return Answer(b"", 302, headers={"location": "/docs"})


if __name__ == "__main__":
    sys.stdout.write(markdown())
