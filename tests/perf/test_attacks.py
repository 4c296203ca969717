"""The attacks on what tenants share, in a small form, against a real service."""

from __future__ import annotations

import pytest

from perf import attacks
from perf.lib.attackers import ATTACKS
from perf.lib.quiet_tenant import QuietTenant, quantile
from perf.lib.target import service

SMALL = 0.02
FIGURES = {"p99": 0.1, "signal_p99": 0.1, "query_max": 0.1, "failed": 0, "signals": 5}


@pytest.fixture(scope="module")
def target():
    with service(rules=1, settings={"ingest__max_tenants": "20"}) as running:
        attacks.save_rule(running)
        yield running


@pytest.fixture(scope="module")
def quiet(target):
    with QuietTenant(target.ingest, target.api) as tenant:
        tenant.measure(1)
        yield tenant


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_quiet_tenant_is_served_beside_each_attack(target, quiet, name):
    found, attack = attacks.attacked(target, quiet, name, 2, SMALL)
    answers = attacks.answers_of(attack)
    assert found["requests"] > 0
    assert found["failed"] == 0
    assert found["signals"] > 0
    assert found["query_max"] < 20  # none failed
    assert "500" not in answers
    if name == "tenant names":
        assert answers["403"] > 0


def test_ratios_ignore_noise():
    assert attacks.ratio(0.001, 0.04) == 1
    assert attacks.ratio(0.1, 0.3) == 3
    assert attacks.ratio(0.01, 0.1) == 2


def test_failures_are_problems():
    good = {"alone": FIGURES, "beside": FIGURES}
    assert attacks.problems("x", good) == []
    bad = {"alone": FIGURES, "beside": FIGURES | {"failed": 2, "signals": 0}}
    assert attacks.problems("x", bad) == [
        "x: 2 requests of the quiet tenant failed",
        "x: no signal arrived",
    ]


def test_the_report_has_a_row_for_each_attack():
    row = {"alone": FIGURES, "beside": FIGURES, "control": FIGURES, "rss_growth_mb": 3.2}
    row |= {f"{what}_ratio": 1.0 for what in ("request", "signal")}
    row |= {f"{what}_control_ratio": 1.0 for what in ("request", "signal")}
    facts = attacks.output.machine()
    text = attacks.show(facts, {"x": row}, 15)
    assert "| x " in text.splitlines()[-1]


def test_attacks_are_chosen_by_name():
    assert attacks.parse(["--only", "PUTs"]).chosen == ["unfinished PUTs of 4 MiB"]
    with pytest.raises(SystemExit):
        attacks.parse(["--only", "nothing"])


def test_quantiles():
    assert quantile([], 0.99) == 0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3
