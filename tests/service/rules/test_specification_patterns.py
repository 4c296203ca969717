"""The specification patterns of docs/rules.md mean what the page says.

A trace is a text with a letter for each span, in the order in which they start.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from betrace.service.rules.definition import make_rule
from betrace.service.traces.example_runs import check_examples

pytestmark = pytest.mark.kernel

PAGE = Path(__file__).parents[3] / "docs/rules.md"
# By rule: the traces that keep it and those that break it.
TRACES = {
    "never { p }": ("qrs", "pq rp"),
    "never { p.where(followed_by(r)) }": ("rp p qr", "pr pqr"),
    "never { p.where(preceded_by(q)) }": ("pq p q", "qp qrp"),
    "never { p.where(preceded_by(q) and followed_by(r)) }": ("pqr qrp qr qp", "qpr qppr"),
    "always { p }": ("p qp", "q qr"),
    "when { r } always { p before r }": ("pr q prp", "r rp"),
    "never { q.where(not followed_by(p)) }": ("qp qqp p", "q qpq pq"),
    "when { q.where(followed_by(r)) } always { p.where(preceded_by(q) and followed_by(r)) }": (
        "qpr rq q p",
        "qr qrp pqr",
    ),
    "never { count(p) > 2 }": ("pp q", "ppp"),
    "never { p.where(not preceded_by(s)) }": ("sp spp q", "p ps psp"),
    "never { p.where(not followed_by(s)) }": ("ps pps q", "p sp psp"),
    "never { p.where(not preceded_by(t.where(preceded_by(s)))) }": ("stp stqp q", "p sp tsp tp"),
    "never { p.where(not followed_by(s.where(followed_by(t)))) }": ("pst pqst q", "p ps pts pt"),
}


def test_each_is_on_the_page() -> None:
    text = PAGE.read_text()
    shown = re.findall(r"\| `([^`]+)` \|$", text[text.index("## Specification patterns") :], re.M)
    assert set(TRACES) <= set(shown)
    assert len(shown) == 18


@pytest.mark.parametrize("condition", TRACES)
def test_which_traces_break_it(condition: str) -> None:
    examples = [
        {
            "name": trace,
            "expect": expect,
            "spans": [{"name": name, "start_ms": at} for at, name in enumerate(trace)],
        }
        for expect, traces in zip(("kept", "broken"), TRACES[condition], strict=True)
        for trace in traces.split()
    ]
    rule = make_rule({"id": "pattern", "condition": condition, "examples": examples})
    assert check_examples([rule]) == []
