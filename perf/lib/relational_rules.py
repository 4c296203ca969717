"""Twenty rules that relate spans, one of each kind, over the spans of :mod:`perf.lib.workload`.

Each begins with one ``step.sNNN`` and a total that half of them have. So with twenty of a hundred
steps, one trace of ten spans in ten is a candidate of a rule. Few traces break one.
"""

from __future__ import annotations

from typing import Any

COUNT = 20

# STEP stands for the spans that make a trace a candidate.
_CONDITIONS = (
    # for each, with a value of the span
    "for each STEP as s always { shop.orders.*.where(span:parentId == s:parentId) or STEP }",
    # for each … by: N+1 queries
    "when { STEP } for each db.* by span:parentId, db.query.text as q never { count(q) > 20 }",
    # for each … by, with conditions of the group
    'when { STEP } for each "SELECT orders" by thread.id as q '
    "never { count(q.where(span:status != error)) > 5 }",
    # along the tree
    "never { STEP.where(not parent(*)) }",
    "never { STEP.where(count(child(*)) > 50) }",
    'never { STEP.where(not ancestor("GET *")) and STEP.where(ancestor(nothing)) }',
    "never { STEP.where(count(descendant(*.where(span:status == error))) > 50) }",
    "never { STEP.where(count(sibling(STEP)) > 10) }",
    # in time
    "never { STEP.where(followed_by(*.where(cache.hit == no))) }",
    "never { STEP.where(not followed_by(* within 1h) and not preceded_by(*)) }",
    "never { STEP.where(not preceded_by(* within 1h)) }",
    # values
    "when { STEP } never { sum(*, db.response.returned_rows) > 100000 }",
    "when { STEP } never { avg(*, http.request.body.size) > 100000 }",
    "when { STEP } never { max(*, order.items) > 1000 or min(*, order.items) < 0 }",
    "when { STEP } never { distinct(*, deployment.environment.name) > 1 }",
    "never { STEP.where(order.total != .order.total + 0) }",
    "never { STEP.where(exists(parent:tenant) and parent:tenant != .tenant) }",
    # scopes
    "when { STEP } never { root:status == error and root:name == nothing }",
    "when { STEP } never { trace:duration > 1h or trace:spans > 100000 }",
    # events and links
    "never { STEP.where(event(event:name == exception) or count(link()) > 3) }",
)


def relational_definitions(first: int, least_total: float = 450) -> list[dict[str, Any]]:
    """The rules, for the steps from number ``first`` on with a total above ``least_total``. Totals
    are evenly distributed from 0 to 900."""
    return [
        {
            "id": f"relation-{number:04d}",
            "name": f"Relation {number}",
            "severity": "medium",
            "condition": condition.replace(
                "STEP", f"step.s{first + number:03d}.where(order.total > {least_total:g})"
            ),
        }
        for number, condition in enumerate(_CONDITIONS)
    ]
