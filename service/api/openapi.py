"""The API's documentation, generated from its endpoints: ``/openapi.json``, the page at ``/docs``,
and ``docs/http-api.md``, which ``python -m betrace.service.api.openapi`` prints."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from betrace.service.api.endpoint import (
    APPLIED_HEADER,
    HTML_TYPE,
    JSON_TYPE,
    Answer,
    Call,
    Endpoint,
    Endpoints,
)
from betrace.service.api.endpoints import (
    alerts,
    breakers,
    caches,
    checkpoints,
    cluster,
    dead_letters,
    fallback,
    health,
    performance,
    pipeline,
    rules,
    signals,
    tenants,
    undecided,
)
from betrace.service.api.reference import INTRODUCTION, all_answers, markdown, page

endpoints = Endpoints("Documentation", access="none")

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
    operation = (
        performance,
        breakers,
        dead_letters,
        fallback,
        checkpoints,
        caches,
        pipeline,
        cluster,
    )
    modules = (signals, alerts, undecided, rules, *operation, tenants, health)
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
            str(code): _response(endpoint, code, text) for code, text in all_answers(endpoint)
        },
    }
    if endpoint.access == "tenant":
        operation["parameters"].append(
            {
                "name": "X-Scope-OrgID",
                "in": "header",
                "required": False,
                "description": "The tenant, for operators or with authentication off.",
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
    """Makes operation ids unique where endpoints share a handler."""
    sharing = [e.path for e in all_endpoints() if e.handler is endpoint.handler]
    return f"_{sharing.index(endpoint.path)}" if sharing.index(endpoint.path) else ""


_APPLIED = {
    "description": "In a cluster: for each partition, in order, the sequence of its `OUT` stream "
    "up to which the answer is complete, separated by commas.",
    "schema": {"type": "string", "example": "118,97,0,12"},
}


def _response(endpoint: Endpoint, code: int, text: str) -> dict[str, Any]:
    if code == 204:
        return {"description": text}
    if code < 300:
        schema = {} if endpoint.media_type == JSON_TYPE else {"type": "string"}
        content = {endpoint.media_type: {"schema": schema}}
        response: dict[str, Any] = {"description": text, "content": content}
        if endpoint.access == "tenant" and endpoint.reads:
            response["headers"] = {APPLIED_HEADER: _APPLIED}
        return response
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": text, "content": {JSON_TYPE: {"schema": schema}}}


@endpoints.add("GET", "/openapi.json", "The OpenAPI document", answers={200: "The document"})
async def get_openapi(call: Call) -> Any:
    return openapi()


@endpoints.add(
    "GET", "/docs", "The API on one page", answers={200: "The page"}, media_type=HTML_TYPE
)
async def get_docs(call: Call) -> Any:
    return Answer(page(all_endpoints()).encode(), media_type=HTML_TYPE)


if __name__ == "__main__":
    sys.stdout.write(markdown(all_endpoints()))
