"""Endpoints that read, change and try a tenant's rules."""

from __future__ import annotations

from typing import Any

import orjson

from service.http.backend import (
    RuleConflictError,
    RuleInvalidError,
    RuleReadOnlyError,
    TraceInvalidError,
)
from service.http.endpoint import Answer, Call, Endpoints
from service.http.errors import ApiError
from service.http.params import Param, read_pattern
from service.rules.errors import RuleSyntaxError
from service.rules.parse import parse

endpoints = Endpoints("Rules")

RULE_ID = Param(
    "id",
    "The rule's id.",
    read_pattern(
        r"[a-z0-9][a-z0-9._-]{0,127}",
        "must be 1 to 128 characters a-z, 0-9, '.', '_' and '-', beginning with a letter or digit",
    ),
    {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,127}$"},
)
_TEXT = {"type": "string"}
RULE_SCHEMA = {
    "type": "object",
    "required": ["condition"],
    "properties": {
        "id": _TEXT,
        "name": _TEXT,
        "description": _TEXT,
        "severity": {"type": "string", "enum": ["critical", "high", "medium", "low", "info"]},
        "enabled": {"type": "boolean", "default": True},
        "labels": {"type": "object", "additionalProperties": _TEXT},
        "condition": _TEXT,
    },
    "additionalProperties": False,
}
_OPTIONAL = {"id": str, "name": str, "description": str, "severity": str} | {
    "enabled": bool,
    "labels": dict,
}


def _tagged(rule: dict[str, Any], status: int = 200) -> Answer:
    return Answer(rule, status, headers={"etag": f'"{rule["revision"]}"'})


def _missing(rule_id: str) -> ApiError:
    return ApiError(404, f"there is no rule {rule_id}", "list them: /api/v1/rules")


def _expected(call: Call) -> str | None:
    """The revision that If-Match names, ``*`` for any; None without If-Match."""
    header = call.headers.get("if-match", "").strip()
    if header in ("", "*"):
        return header or None
    if len(header) < 3 or header[0] != '"' or header[-1] != '"' or '"' in header[1:-1]:
        raise ApiError(
            400,
            f"If-Match is {header[:80]!r}",
            "send the ETag of the rule with its quotes, or *",
        )
    return header[1:-1]


def _conflict(rule_id: str, expected: str | None, current: str | None) -> ApiError:
    if current is None:
        return _missing(rule_id)
    headers = {"etag": f'"{current}"'}
    if expected is None:
        return ApiError(
            428,
            f"the rule {rule_id} exists already",
            f'to replace it, read it and send If-Match: "{current}" (its ETag), or If-Match: *',
            headers,
        )
    return ApiError(
        412,
        f"the rule {rule_id} was changed by someone else: it is at {current}, not {expected}",
        "read it again, make your change to it, and send its new ETag",
        headers,
    )


@endpoints.add("GET", "/api/v1/rules", "The tenant's rules", answers={200: '`{"rules": […]}`'})
async def list_rules(call: Call) -> Any:
    """By id; each with `version` (a hash of its condition) and `revision` (its ETag)."""
    return {"rules": await call.blocking(call.backend.queries.rules, call.tenant)}


@endpoints.add(
    "GET",
    "/api/v1/rules/{id}",
    "A rule",
    path_params=(RULE_ID,),
    answers={200: "The rule; its revision is the `ETag`", 404: "There is no such rule"},
)
async def get_rule(call: Call) -> Any:
    rule = await call.blocking(call.backend.queries.rule, call.tenant, call.params["id"])
    if rule is None:
        raise _missing(call.params["id"])
    return _tagged(rule)


@endpoints.add(
    "PUT",
    "/api/v1/rules/{id}",
    "Create or replace a rule",
    path_params=(RULE_ID,),
    body=RULE_SCHEMA,
    answers={
        200: "The rule was replaced",
        201: "The rule was created",
        400: "The rule has errors, in `error.errors` as `rules/validate` gives them",
        404: "`If-Match` was sent, but there is no such rule",
        409: "The rule comes from a file; change the file",
        412: "The rule is not at the revision in `If-Match`",
        428: "The rule exists, and `If-Match` was not sent",
    },
)
async def put_rule(call: Call) -> Any:
    """The fields are those of a rule file. The rule is checked before it is saved, and its earlier
    versions are kept. To replace a rule send its `ETag` as `If-Match`, or `*`; to create one send
    none. Traces already open are decided by the rules they were opened under."""
    rule_id = call.params["id"]
    rule = call.json({"condition": str}, _OPTIONAL)
    if rule.pop("id", rule_id) != rule_id:
        raise ApiError(400, "the id in the body is not that in the path", "leave it out there")
    expected = _expected(call)
    queries = call.backend.queries
    try:
        saved = await call.blocking(queries.put_rule, call.tenant, rule_id, rule, expected)
    except RuleInvalidError as error:
        raise ApiError(
            400,
            "the rule has errors; nothing was saved",
            error.errors[0]["message"],
            details={"errors": error.errors},
        ) from error
    except RuleConflictError as error:
        raise _conflict(rule_id, expected, error.current) from error
    except RuleReadOnlyError as error:
        raise _read_only(rule_id, error) from error
    return _tagged(saved, 201 if expected is None else 200)


@endpoints.add(
    "DELETE",
    "/api/v1/rules/{id}",
    "Delete a rule",
    path_params=(RULE_ID,),
    answers={
        204: "The rule was deleted; its signals stay",
        404: "There is no such rule",
        409: "The rule comes from a file; change the file",
        412: "The rule is not at the revision in `If-Match`",
        428: "`If-Match` was not sent",
    },
)
async def delete_rule(call: Call) -> Any:
    """Needs `If-Match`: the rule's `ETag`, or `*`."""
    rule_id = call.params["id"]
    expected = _expected(call)
    if expected is None:
        raise ApiError(428, "If-Match was not sent", "send the ETag of the rule, or If-Match: *")
    try:
        await call.blocking(call.backend.queries.delete_rule, call.tenant, rule_id, expected)
    except RuleConflictError as error:
        raise _conflict(rule_id, expected, error.current) from error
    except RuleReadOnlyError as error:
        raise _read_only(rule_id, error) from error
    return Answer(b"", 204)


def _read_only(rule_id: str, error: RuleReadOnlyError) -> ApiError:
    return ApiError(409, f"the rule {rule_id} comes from a file ({error})", "change it there")


@endpoints.add(
    "POST",
    "/api/v1/rules/validate",
    "Check a condition; nothing is saved",
    body={"type": "object", "required": ["condition"], "properties": {"condition": _TEXT}},
    answers={200: '`{"valid", "errors": [{"line", "column", "message", "hint"}]}`'},
)
async def validate_rule(call: Call) -> Any:
    """Line and column count from 1."""
    given = call.json({"condition": str}, {})
    try:
        await call.blocking(parse, given["condition"])
    except RuleSyntaxError as error:
        return {"valid": False, "errors": [error.to_json()]}
    return {"valid": True, "errors": []}


@endpoints.add(
    "POST",
    "/api/v1/rules/test",
    "What a condition says of a trace; nothing is saved",
    body={
        "type": "object",
        "required": ["condition", "trace"],
        "properties": {
            "condition": _TEXT,
            "trace": {"type": "object", "description": "OTLP JSON: `resourceSpans`"},
        },
    },
    answers={
        200: '`{"breach", "clause", "counts", "evidence"}`; `clause` is null without a breach',
        400: "The condition has errors (`error.errors`), or the trace cannot be read",
    },
)
async def test_rule(call: Call) -> Any:
    """The spans are taken as one complete trace."""
    given = call.json({"condition": str, "trace": dict}, {})
    trace = orjson.dumps(given["trace"])
    try:
        return await call.blocking(call.backend.queries.test_rule, given["condition"], trace)
    except RuleSyntaxError as error:
        raise ApiError(
            400,
            f"the condition has an error: {error.message}",
            error.hint or "",
            details={"errors": [error.to_json()]},
        ) from error
    except TraceInvalidError as error:
        raise ApiError(
            400,
            f"the trace cannot be read: {error}",
            'send OTLP JSON: {"resourceSpans": […]}, with the spans of one trace',
        ) from error
