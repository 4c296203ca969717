"""The pages of rules: the list, one rule with its history, and the editor."""

from __future__ import annotations

from typing import Any

import orjson

from betrace.service.api.endpoint import Answer
from betrace.service.api.endpoints import rules as api
from betrace.service.api.endpoints import signals as signals_api
from betrace.service.api.errors import ApiError, translate
from betrace.service.api.pages.evidence import lines
from betrace.service.api.pages.visit import Page, Visit
from betrace.service.api.params import Param, read_param
from betrace.service.rules.definition import SEVERITIES, Rule
from betrace.service.rules.plans import plan
from betrace.service.storage.duck.queries import SignalFilter

Json = dict[str, Any]

LATEST = 10
MOST_VERSIONS = 20
NEW: Json = {
    "id": "",
    "name": "",
    "description": "",
    "severity": "medium",
    "enabled": True,
    "labels": {},
    "condition": "",
    "etag": "",
}
_ID = Param("id", "", api.RULE_ID.read)
_FORM_FIELDS = ("id", "name", "description", "severity", "condition", "etag")


async def rule_list(visit: Visit) -> Page:
    """All rules of the tenant."""
    visit.params(())
    listed = await api.list_rules(visit.call({}))
    rules = sorted(listed["rules"], key=lambda rule: (-(rule["active_signals"] or 0), rule["id"]))
    return await visit.show("rules.html", lambda: {"rules": rules})


async def rule_page(visit: Visit, rule_id: str) -> Page:
    """One rule."""
    visit.params(())
    rule_id = read_param(api.RULE_ID, rule_id)
    answer: Answer = await api.get_rule(visit.call({"id": rule_id}))
    return await visit.show("rule.html", lambda: _rule(visit, answer.body))


def _rule(visit: Visit, shown: Json) -> Json:
    tools, tenant = visit.tools, visit.viewer.tenant
    rule = tools.sources.rules.rule(tenant, shown["id"])
    wanted = SignalFilter(rule=rule.id)
    found, following = tools.store.signals(tenant, wanted, limit=LATEST)
    undecided, _ = tools.undecided.page(tenant, rule=rule.id, limit=1)
    return {
        "rule": shown,
        "undecided": bool(undecided),
        "mute": tools.triage.current_mute(tenant, rule.id),
        "lines": lines(rule.condition, []),
        "plan": plan(rule.syntax) if rule.syntax.relational else None,
        "signals": visit.signals(found),
        "more_signals": following is not None,
        "names": {rule.id: rule.name},
        "versions": [_version(each) for each in tools.sources.rules.versions(tenant, rule.id)],
    }


def _version(rule: Rule) -> Json:
    return {**rule.definition(), "version": rule.version, "lines": lines(rule.condition, [])}


async def editor(visit: Visit) -> Page:
    """The form for a new rule, or for the rule ``id``."""
    rule_id = visit.params((_ID,))["id"]
    rule = NEW
    if rule_id is not None:
        answer: Answer = await api.get_rule(visit.call({"id": rule_id}))
        rule = answer.body
    return await _form(visit, rule, {})


async def edit(visit: Visit) -> Page:
    """Check, test or save what the form has, as its button says."""
    form = visit.form
    rule: Json = {name: form.get(name, "").strip() for name in _FORM_FIELDS}
    rule["condition"] = form.get("condition", "").replace("\r\n", "\n")
    rule["enabled"] = "enabled" in form
    rule["labels"] = _labels(form.get("labels", ""))
    action = form.get("action", "check")
    try:
        if action == "save":
            return await _save(visit, rule)
        if action == "test":
            return await _form(visit, rule, {"verdict": await _test(visit, rule["condition"])})
        checked = await api.validate_rule(visit.call({}, {"condition": rule["condition"]}))
        return await _form(visit, rule, {"checked": checked, "errors": checked["errors"]})
    except Exception as raised:
        error = raised if isinstance(raised, ApiError) else translate(raised)
        if error is None:
            raise
        errors = error.details.get("errors")
        message = None if errors else f"{error.message}; {error.hint}"
        shown = {"errors": errors or [], "problem": message}
        return await _form(visit, rule, shown, error.status)


async def check(visit: Visit) -> Page:
    """Check a condition while it is typed; the answer is that of the API."""
    found = await api.validate_rule(visit.call({}, {"condition": visit.form.get("condition", "")}))
    errors = [{**each, **_excerpt(visit.form["condition"], each)} for each in found["errors"]]
    return await visit.show("check.html", lambda: {"checked": found, "errors": errors})


async def _save(visit: Visit, rule: Json) -> Page:
    if not visit.viewer.may_change:
        raise ApiError(403, "your token can only read", "sign in with another token")
    api_rule = {k: v for k, v in rule.items() if k not in ("id", "etag")}
    rule_id = read_param(api.RULE_ID, rule["id"])
    call = visit.call({"id": rule_id}, api_rule)
    if rule["etag"]:
        current = visit.tools.sources.rules.rule(visit.viewer.tenant, rule_id).definition()
        call = visit.call({"id": rule_id}, {**current, **api_rule})  # keeps what the form has not
        call.headers["if-match"] = rule["etag"]
    await api.put_rule(call)
    return Page(status=303, location=visit.link(f"/rules/{rule_id}"))


async def _test(visit: Visit, condition: str) -> Json:
    trace_id = read_param(signals_api.TRACE_ID, visit.form.get("trace_id", "").strip())
    answer = await signals_api.get_trace(visit.call({"trace_id": trace_id}))
    trace = orjson.loads(answer.body)
    given = {"condition": condition, "trace": {"resourceSpans": trace["resourceSpans"]}}
    found: Json = await api.test_rule(visit.call({}, given))
    return {
        "undecided": None,
        **found,
        "trace_id": trace_id,
        "missing": trace["missing"] or trace["omittedSpans"],
    }


async def _form(visit: Visit, rule: Json, result: Json, status: int = 200) -> Page:
    shown: Json = {"checked": None, "errors": [], "problem": None, "verdict": None} | result
    shown["errors"] = [{**each, **_excerpt(rule["condition"], each)} for each in shown["errors"]]
    labels = ", ".join(f"{name}={value}" for name, value in rule["labels"].items())
    more = {"rule": rule, "labels": labels, "severities": SEVERITIES}
    trace_id = visit.form.get("trace_id", "")
    return await visit.show("editor.html", lambda: {**shown, **more, "trace_id": trace_id}, status)


def _excerpt(condition: str, error: Json) -> Json:
    """The line of an error, and a caret below the place."""
    if not error.get("line"):
        return {"excerpt": None}
    found = condition.split("\n")[error["line"] - 1 : error["line"]]
    line = found[0] if found else ""
    column = error["column"] - 1
    start = max(0, column - 60)
    return {"excerpt": f"{line[start : start + 120]}\n{' ' * (column - start)}^"}


def _labels(text: str) -> dict[str, str]:
    pairs = (each.partition("=") for each in text.split(",") if each.strip())
    return {name.strip(): value.strip() for name, _, value in pairs}
