"""The page of traces that rules could not judge."""

from __future__ import annotations

from typing import Any

from betrace.service.api.node_cursors import make_cursor, read_cursor
from betrace.service.api.pages.signals import ROWS, rule_names
from betrace.service.api.pages.visit import Page, Visit
from betrace.service.api.params import Param, read_integer, read_text

Json = dict[str, Any]

_FILTERS = (
    Param("rule", "", read_text),
    Param("cursor", "", read_integer(0, 2**63 - 1)),
)


async def undecided_list(visit: Visit) -> Page:
    """The traces, newest first, with the reasons."""
    given = visit.params(_FILTERS)
    sources = visit.tools.sources
    before = read_cursor(sources, given["cursor"])

    def build() -> Json:
        found, number = visit.tools.undecided.page(
            visit.viewer.tenant, rule=given["rule"], limit=ROWS, before=before
        )
        following = make_cursor(sources, number)
        return {"undecided": found, "following": following, "names": rule_names(visit)}

    return await visit.show("undecided.html", build)
