"""Servers and clients for the tests of the cluster's storage."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected

_numbers = itertools.count()


@pytest.fixture(scope="session")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    """A server that all tests share; no test may harm it."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers


@pytest.fixture
def settings(one_server: NatsServers) -> ClusterSettings:
    """A cluster of its own for each test."""
    return one_server.settings(prefix=f"test{next(_numbers)}")


@pytest.fixture
async def client(settings: ClusterSettings) -> AsyncIterator[NatsClient]:
    """A client; the streams exist."""
    async with connected(settings) as client:
        yield client
