"""A service with its stores, not running, and a client of its API."""

import pytest

from betrace.service.api import trace_view
from betrace.service.api.endpoints import rules as rule_endpoints
from betrace.service.pipeline.warmup import warm_up
from tests.support.api_client import ApiClient
from tests.support.inprocess import opened, settings


@pytest.fixture(autouse=True)
def _unlimited_cpu(monkeypatch):
    """A kernel may be compiled or loaded in the middle of a trial."""
    for module in (trace_view, rule_endpoints):
        monkeypatch.setattr(module, "TRIAL_SECONDS", 3600)


@pytest.fixture(scope="session")
def warm():
    """Compile the kernels first, because that takes longer than a query may."""
    warm_up()


@pytest.fixture
async def service(tmp_path):
    with opened(settings(tmp_path)) as service:
        yield service


@pytest.fixture
async def client(service):
    return ApiClient(service)
