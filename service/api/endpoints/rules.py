"""Endpoints that read, change and try a tenant's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from betrace.service.api.backend import RuleExistsError
from betrace.service.api.endpoint import Answer, Call, Endpoints
from betrace.service.api.params import Param, read_pattern
from betrace.service.receiver.responses import ApiError
from betrace.service.rules.definition import Problem, RuleFileError
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.parse import parse
from betrace.service.rules.store import (
    RuleConflictError,
    RuleLimitError,
    RuleNotFoundError,
    RuleReadOnlyError,
)

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
_TAGS = re.compile(r'"[^"]+"(\s*,\s*"[^"]+")*')
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
    return Answer(rule, status, headers={"etag": rule["etag"]})


@contextmanager
def _refusals(rule_id: str) -> Iterator[None]:
    """Turn what the rule store raises into answers."""
    try:
        yield
    except RuleNotFoundError as error:
        raise ApiError(404, str(error), "list them: /api/v1/rules") from error
    except RuleExistsError as error:
        raise ApiError(
            428,
            f"the rule {rule_id} exists already",
            f"to replace it, read it and send its ETag, If-Match: {error.etag}, or If-Match: *",
            {"etag": error.etag},
        ) from error
    except RuleConflictError as error:
        hint = "read it again, make your change to it, and send its new ETag"
        raise ApiError(412, str(error), hint) from error
    except (RuleReadOnlyError, RuleLimitError) as error:
        raise ApiError(409, str(error), "nothing was changed") from error
    except RuleFileError as error:
        faults = [_fault(problem) for problem in error.problems]
        raise ApiError(
            400,
            f"the rule has errors: {faults[0]['message']}",
            faults[0]["hint"] or "nothing was saved",
            details={"errors": faults},
        ) from error


def _fault(problem: Problem) -> dict[str, Any]:
    if problem.syntax is not None:
        return problem.syntax.to_json()
    return {"line": None, "column": None, "message": problem.message, "hint": problem.hint}


def _if_match(call: Call) -> str | None:
    """The value of If-Match: * or entity tags in quotes; None without it."""
    header = call.headers.get("if-match", "").strip()
    if not header or header == "*":
        return header or None
    if not _TAGS.fullmatch(header):
        hint = "send the ETag of the rule with its quotes, or *"
        raise ApiError(400, f"If-Match is {header[:80]!r}", hint)
    return header


@endpoints.add("GET", "/api/v1/rules", "The tenant's rules", answers={200: '`{"rules": […]}`'})
async def list_rules(call: Call) -> Any:
    """By id; each with `version` (a hash of its condition), `etag` and `active_signals` (how many
    stand; null while the store cannot say)."""
    return {"rules": await call.blocking(call.backend.queries.rules, call.tenant)}


@endpoints.add(
    "GET",
    "/api/v1/rules/{id}",
    "A rule",
    path_params=(RULE_ID,),
    answers={200: "The rule; its `ETag` changes with it", 404: "There is no such rule"},
)
async def get_rule(call: Call) -> Any:
    rule_id = call.params["id"]
    with _refusals(rule_id):
        return _tagged(await call.blocking(call.backend.queries.rule, call.tenant, rule_id))


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
        409: "The rule is written in a file by hand, or there are too many",
        412: "The rule is not the one that `If-Match` names",
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
    put = call.backend.queries.put_rule
    with _refusals(rule_id):
        saved, created = await call.blocking(put, call.tenant, rule_id, rule, _if_match(call))
    return _tagged(saved, 201 if created else 200)


@endpoints.add(
    "DELETE",
    "/api/v1/rules/{id}",
    "Delete a rule",
    path_params=(RULE_ID,),
    answers={
        204: "The rule was deleted; its signals stay",
        404: "There is no such rule",
        409: "The rule is written in a file by hand",
        412: "The rule is not the one that `If-Match` names",
        428: "`If-Match` was not sent",
    },
)
async def delete_rule(call: Call) -> Any:
    """Needs `If-Match`: the rule's `ETag`, or `*`."""
    rule_id = call.params["id"]
    if_match = _if_match(call)
    if if_match is None:
        raise ApiError(428, "If-Match was not sent", "send the ETag of the rule, or If-Match: *")
    with _refusals(rule_id):
        await call.blocking(call.backend.queries.delete_rule, call.tenant, rule_id, if_match)
    return Answer(b"", 204)


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
    with _refusals("trial"):
        return await call.blocking(call.backend.queries.test_rule, given["condition"], trace)
