"""Endpoints that read, change and test a tenant's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from betrace.service.api.endpoint import Answer, Call, Endpoints, Tools
from betrace.service.api.errors import ApiError, unavailable
from betrace.service.api.params import Param, read_pattern
from betrace.service.otlp.json import OtlpJsonError, to_protobuf
from betrace.service.rules.compile import compile_rules
from betrace.service.rules.definition import (
    ALERT,
    JUDGE,
    SEVERITIES,
    SHADOW,
    SKIP,
    Rule,
    etag,
    make_rule,
)
from betrace.service.rules.errors import RuleSyntaxError
from betrace.service.rules.examples import MAX_EXAMPLES
from betrace.service.rules.parse import parse
from betrace.service.rules.plans import decided_by, plan
from betrace.service.rules.store import RuleNotFoundError
from betrace.service.rules.units import warnings
from betrace.service.storage.duck.pool import PoolTimeout
from betrace.service.storage.duck.schema import StoreError
from betrace.service.storage.triage import Mute
from betrace.service.times import SECOND, read_duration, write_time
from betrace.service.traces.trial import TRIAL_SECONDS, Trial, TrialError

endpoints = Endpoints("Rules")

RULE_ID = Param(
    "id",
    "The id of the rule.",
    read_pattern(
        r"[a-z0-9][a-z0-9._-]{0,127}",
        "must be 1 to 128 characters a-z, 0-9, '.', '_' and '-', starting with a letter or digit",
    ),
    {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,127}$"},
)
_TAGS = re.compile(r'"[^"]+"(\s*,\s*"[^"]+")*')
_FOREVER = 2**63 - 1
_LONGEST_MUTE = 366 * 86_400 * SECOND
_LONGEST_REASON = 500
_TEXT = {"type": "string"}
RULE_SCHEMA = {
    "type": "object",
    "required": ["condition"],
    "properties": {
        "id": _TEXT,
        "name": _TEXT,
        "description": _TEXT,
        "severity": {"type": "string", "enum": list(SEVERITIES)},
        "enabled": {"type": "boolean", "default": True},
        "labels": {"type": "object", "additionalProperties": _TEXT},
        "mode": {"type": "string", "enum": [ALERT, SHADOW], "default": ALERT},
        "incomplete": {"type": "string", "enum": [JUDGE, SKIP], "default": JUDGE},
        "condition": _TEXT,
        "examples": {"type": "array", "items": {"type": "object"}, "maxItems": MAX_EXAMPLES},
    },
    "additionalProperties": False,
}
_OPTIONAL = {"id": str, "name": str, "description": str, "severity": str} | {
    "enabled": bool,
    "labels": dict,
    "mode": str,
    "incomplete": str,
    "examples": list,
}


def _tagged(call: Call, rule: Rule, status: int = 200) -> Answer:
    shown = _rule_json(call.tools, call.tenant, rule)
    return Answer(shown, status, headers={"etag": etag(rule)})


def _rule_json(tools: Tools, tenant: str, rule: Rule) -> dict[str, Any]:
    try:
        source, editable = tools.sources.rules.source(tenant, rule.id)
    except RuleNotFoundError:  # it was deleted in the meantime
        source, editable = None, False
    return {
        **rule.definition(examples=False),
        "mode": rule.mode,
        "incomplete": rule.incomplete,
        "examples": [example.definition() for example in rule.examples],
        "version": rule.version,
        "etag": etag(rule),
        "editable": editable,
        "all_tenants": tools.sources.rules.for_all_tenants(rule.id),
        "source": source,
        "decided_by": decided_by(rule.syntax),
        "plan": plan(rule.syntax),
        "muted": _mute_json(tools.triage.current_mute(tenant, rule.id)),
    }


def _mute_json(mute: Mute | None) -> dict[str, Any] | None:
    if mute is None:
        return None
    times = {"since": write_time(mute.since_ns), "until": write_time(mute.until_ns)}
    return {**times, "reason": mute.reason, "by": mute.by}


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unavailable(
            f"the rule cannot be written ({error.strerror or error})",
            "free disk space, or give the service write permission, then try again",
        ) from error


def _if_match(call: Call) -> str | None:
    """The value of If-Match: * or entity tags in quotes; None if it was not sent."""
    header = call.headers.get("if-match", "").strip()
    if not header or header == "*":
        return header or None
    if not _TAGS.fullmatch(header):
        hint = "send the ETag of the rule with its quotes, or *"
        raise ApiError(400, f"If-Match is {header[:80]!r}", hint)
    return header


@endpoints.add("GET", "/api/v1/rules", "The tenant's rules", answers={200: '`{"rules": […]}`'})
async def list_rules(call: Call) -> Any:
    """Sorted by id. Each has `version` (a hash of its condition), `etag`, `source` (its file in the
    rule directory), `editable` (false for files written by hand, which only change on disk),
    `all_tenants` (whether it is a rule of the operator's for all tenants, which is never editable),
    `muted` (null, or `since`, `until`, `reason` and `by`) and `active_signals` (the number of
    active signals; null while the store is unavailable)."""
    return {"rules": await call.blocking(_rules, call.tools, call.tenant)}


def _rules(tools: Tools, tenant: str) -> list[dict[str, Any]]:
    rules = sorted(tools.sources.rules.rules(tenant), key=lambda rule: rule.id)
    active: dict[str, int | None] = {rule.id: 0 for rule in rules}
    try:
        for row in tools.store.summary(tenant, 0, _FOREVER, _FOREVER):
            active[row.rule_id] = row.raised - row.retracted + (active.get(row.rule_id) or 0)
    except (StoreError, PoolTimeout):  # the rules are files and can still be listed
        active = dict.fromkeys(active)
    return [
        {**_rule_json(tools, tenant, rule), "active_signals": active[rule.id]} for rule in rules
    ]


@endpoints.add(
    "GET",
    "/api/v1/rules/{id}",
    "A rule",
    path_params=(RULE_ID,),
    answers={200: "The rule; its `ETag` changes when the rule does", 404: "There is no such rule"},
)
async def get_rule(call: Call) -> Any:
    return _tagged(call, call.tools.sources.rules.rule(call.tenant, call.params["id"]))


@endpoints.add(
    "PUT",
    "/api/v1/rules/{id}",
    "Create or replace a rule",
    path_params=(RULE_ID,),
    body=RULE_SCHEMA,
    answers={
        200: "The rule was replaced",
        201: "The rule was created",
        400: "The rule has errors, listed in `error.errors` as by `rules/validate`",
        404: "`If-Match` was sent, but there is no such rule",
        409: "The rule belongs to a file written by hand or is one for all tenants, or there are "
        "too many rules",
        412: "`If-Match` does not match the rule",
        428: "The rule exists, and `If-Match` was not sent",
    },
)
async def put_rule(call: Call) -> Any:
    """The fields are those of a rule file. The rule is checked before it is saved, and its
    examples are run: one that does not do what it says is an error. Earlier versions are kept.
    To replace a rule, send its `ETag` or `*` as `If-Match`; to create one, omit the header.
    Open traces are evaluated by the rules in force when they were opened."""
    rule_id = call.params["id"]
    rule = call.json({"condition": str}, _OPTIONAL)
    if rule.pop("id", rule_id) != rule_id:
        raise ApiError(
            400, "the id in the body differs from the one in the path", "omit it from the body"
        )
    put, if_match = call.tools.rule_writer.put, _if_match(call)
    with _disk_errors():
        saved, created = await call.blocking(put, call.tenant, rule_id, rule, if_match)
    return _tagged(call, saved, 201 if created else 200)


@endpoints.add(
    "DELETE",
    "/api/v1/rules/{id}",
    "Delete a rule",
    path_params=(RULE_ID,),
    answers={
        204: "The rule was deleted; its signals are kept",
        404: "There is no such rule",
        409: "The rule belongs to a file written by hand, or is one for all tenants",
        412: "`If-Match` does not match the rule",
        428: "`If-Match` was not sent",
    },
)
async def delete_rule(call: Call) -> Any:
    """Requires `If-Match`: the `ETag` of the rule, or `*`."""
    if_match = _if_match(call)
    if if_match is None:
        raise ApiError(428, "If-Match was not sent", "send the ETag of the rule, or If-Match: *")
    with _disk_errors():
        await call.blocking(call.tools.rule_writer.delete, call.tenant, call.params["id"], if_match)
    return Answer(b"", 204)


@endpoints.add(
    "PUT",
    "/api/v1/rules/{id}/mute",
    "Mute a rule for a time",
    path_params=(RULE_ID,),
    body={
        "type": "object",
        "required": ["for", "reason"],
        "properties": {"for": {**_TEXT, "example": "2h"}, "reason": _TEXT},
    },
    answers={200: '`{"since", "until", "reason", "by"}`', 404: "There is no such rule"},
)
async def mute_rule(call: Call) -> Any:
    """Signals of a muted rule are recorded and shown as muted, start no alert, and are not sent to
    webhooks; an alert that fires resolves at once. `for` is a duration of up to 366 days; a new
    mute replaces the current one. `by` is the name in `X-Operator`, or the tenant. The audit log
    records who muted what."""
    rule_id, given = call.params["id"], call.json({"for": str, "reason": str}, {})
    call.tools.sources.rules.rule(call.tenant, rule_id)
    try:
        duration = read_duration(given["for"])
    except ValueError as error:
        raise ApiError(400, f"for {error}", "send for example 2h") from None
    reason = given["reason"].strip()
    if not 0 < duration <= _LONGEST_MUTE:
        raise ApiError(400, "for must be more than 0 and at most 366d", "choose another time")
    if not 0 < len(reason) <= _LONGEST_REASON:
        raise ApiError(
            400, f"reason must have 1 to {_LONGEST_REASON} characters", "say why it is muted"
        )
    who = call.person()
    target = {"tenant": call.tenant, "rule": rule_id, "for": given["for"], "reason": reason}
    await call.tools.audit.note(who, "rule.mute", target)
    mute = call.tools.triage_writer.mute
    return _mute_json(await call.blocking(mute, call.tenant, rule_id, duration, reason, who.name))


@endpoints.add(
    "DELETE",
    "/api/v1/rules/{id}/mute",
    "End the mute of a rule",
    path_params=(RULE_ID,),
    answers={204: "The rule is no longer muted", 404: "The rule is not muted"},
)
async def unmute_rule(call: Call) -> Any:
    """The audit log records who ended it."""
    rule_id = call.params["id"]
    if call.tools.triage.current_mute(call.tenant, rule_id) is None:
        raise ApiError(404, f"the rule '{rule_id}' is not muted", "nothing was changed")
    target = {"tenant": call.tenant, "rule": rule_id}
    await call.tools.audit.note(call.person(), "rule.unmute", target)
    await call.blocking(call.tools.triage_writer.unmute, call.tenant, rule_id)
    return Answer(b"", 204)


@endpoints.add(
    "POST",
    "/api/v1/rules/validate",
    "Check a condition; nothing is saved",
    reads=True,
    body={"type": "object", "required": ["condition"], "properties": {"condition": _TEXT}},
    answers={
        200: '`{"valid", "errors": [{"line", "column", "message", "hint"}]}`; for a valid rule '
        "also `decided_by` (`fold`, `skeleton`, `values by key` or `read back`) and `plan`: how it "
        "is decided, and the cost; and `warnings`, like `errors`, if there are any",
    },
)
async def validate_rule(call: Call) -> Any:
    """Lines and columns count from 1."""
    given = call.json({"condition": str}, {})
    try:
        return await call.blocking(_validated, given["condition"])
    except RuleSyntaxError as error:
        return {"valid": False, "errors": [error.to_json()]}


def _validated(condition: str) -> dict[str, Any]:
    syntax = parse(condition)
    plans = {"decided_by": decided_by(syntax), "plan": plan(syntax)}
    valid: dict[str, Any] = {"valid": True, "errors": [], **plans}
    if found := warnings(condition):
        valid["warnings"] = [warning.to_json() for warning in found]
    return valid


@endpoints.add(
    "POST",
    "/api/v1/rules/test",
    "Evaluate a condition on a trace; nothing is saved",
    reads=True,
    body={
        "type": "object",
        "required": ["condition", "trace"],
        "properties": {
            "condition": _TEXT,
            "trace": {"type": "object", "description": "OTLP JSON: `resourceSpans`"},
        },
    },
    answers={
        200: '`{"breach", "clause", "counts", "evidence", "message"}`; `clause` and `message` '
        "are null without a breach. Of a broken rule with `for each`, also `groups`; of one that "
        "could not be judged, `undecided`: the reason",
        400: "The condition has errors (`error.errors`), or the trace cannot be read",
    },
)
async def test_rule(call: Call) -> Any:
    """The spans are evaluated as one complete trace."""
    given = call.json({"condition": str, "trace": dict}, {})
    return await call.compute(_evaluate, given["condition"], orjson.dumps(given["trace"]))


def _evaluate(condition: str, trace: bytes) -> dict[str, Any]:
    rules = compile_rules([make_rule({"id": "trial", "condition": condition})])
    trial = Trial(rules, seconds=TRIAL_SECONDS)
    try:
        trial.add(to_protobuf(trace))
        (verdict,) = trial.verdicts()
    except (OtlpJsonError, TrialError) as error:
        raise ApiError(
            400,
            f"the trace cannot be evaluated: {error}",
            'send OTLP JSON: {"resourceSpans": […]}, with the spans of one trace',
        ) from error
    shown = verdict.to_json()
    del shown["rule_id"]
    return shown
