"""Shared by all tests: assertions of helpers, and how thorough hypothesis is.

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
