"""What people can do on a page: acknowledge a signal, mute a rule, sign in and out.

The endpoints of the API do the work, so checks, the audit log and the answers are the same.
"""

from __future__ import annotations

import re
from typing import Any

from betrace.service.api.endpoints import rules as rules_api
from betrace.service.api.endpoints import signals as signals_api
from betrace.service.api.errors import ApiError
from betrace.service.api.pages.visit import Page, Visit
from betrace.service.api.params import read_param

NAME_COOKIE = "betrace_name"
_YEAR = 365 * 86_400
_LOCAL = re.compile(r"/(?![/\\])[\x21-\x7e]*")

Json = dict[str, Any]


async def acknowledge(visit: Visit, signal_id: str) -> Page:
    """Acknowledge a signal."""
    given = {"id": read_param(signals_api.SIGNAL_ID, signal_id)}
    await signals_api.acknowledge_signal(visit.call(given, {"note": visit.form.get("note", "")}))
    return _done(visit, f"/signals/{given['id']}")


async def mute(visit: Visit, rule_id: str) -> Page:
    """Mute a rule."""
    given = {"id": read_param(rules_api.RULE_ID, rule_id)}
    wanted = {"for": visit.form.get("for", ""), "reason": visit.form.get("reason", "")}
    await rules_api.mute_rule(visit.call(given, wanted))
    return _done(visit, f"/rules/{given['id']}")


async def unmute(visit: Visit, rule_id: str) -> Page:
    """End the mute of a rule."""
    given = {"id": read_param(rules_api.RULE_ID, rule_id)}
    await rules_api.unmute_rule(visit.call(given))
    return _done(visit, f"/rules/{given['id']}")


def _done(visit: Visit, otherwise: str) -> Page:
    """Back to the page with the form, remembering the name."""
    page = Page(status=303, location=local(visit.form.get("back", "")) or visit.link(otherwise))
    if name := visit.form.get("by", "").strip():
        page.cookies[NAME_COOKIE] = (name, _YEAR)
    return page


def local(path: str) -> str | None:
    """``path`` if it is an address of this service, without a host; else None."""
    return path if _LOCAL.fullmatch(path) else None


def problem(error: ApiError) -> Json:
    """An error as its page shows it."""
    return {"status": error.status, "message": error.message, "hint": error.hint}
