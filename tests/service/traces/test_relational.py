"""Rules of the whole language through the engine, with candidates read back from a span log."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from betrace.service.storage.spanlog.log import SpanLog
from tests.support.relational_arrivals import ARRIVALS, check_arrivals

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpanLog]:
    with SpanLog(tmp_path_factory.mktemp("log")) as log:
        yield log


@given(**ARRIVALS)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_verdicts_are_those_of_whole_traces(log, rules, traces, seed, between):
    check_arrivals(log, rules, traces, seed, between)
