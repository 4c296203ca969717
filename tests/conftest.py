"""Shared by all tests: how thorough hypothesis is, and which tests must not run side by side.

``BETRACE_EXAMPLES=10000 pytest tests/service/traces`` is the long run.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")

settings.register_profile(
    "betrace",
    deadline=None,  # kernels compile in the middle of a test
    max_examples=int(os.environ.get("BETRACE_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("betrace")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow tests into one group. With ``--dist loadgroup`` they run one after another in
    the same process, because they start processes and measure time."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group("slow"))
