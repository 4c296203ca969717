"""A service with its stores, not running, and a client of its API."""

import pytest

from tests.support.api_client import ApiClient
from tests.support.inprocess import opened, settings


@pytest.fixture
async def service(tmp_path):
    with opened(settings(tmp_path)) as service:
        yield service


@pytest.fixture
async def client(service):
    return ApiClient(service)
