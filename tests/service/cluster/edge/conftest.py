"""NATS servers for the tests of edges."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from betrace.service.config.cluster import ClusterSettings
from betrace.service.storage.jetstream.client import NatsClient
from tests.support.nats_servers import MISSING, PROGRAM, NatsServers, connected

_numbers = itertools.count()


@pytest.fixture(scope="package")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    """A server that tests share; no test may harm it."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers


@pytest.fixture
def cluster(one_server: NatsServers) -> ClusterSettings:
    """A cluster of its own for each test."""
    return one_server.settings(prefix=f"edge{next(_numbers)}", partitions=4)


@pytest.fixture
async def client(cluster: ClusterSettings) -> AsyncIterator[NatsClient]:
    """A client; the streams exist."""
    async with connected(cluster) as client:
        yield client


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as found:
        yield found
