"""A NATS server for the tests of a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.nats_servers import MISSING, PROGRAM, NatsServers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    """A server of its own for each module."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with NatsServers(tmp_path_factory.mktemp("nats")) as servers:
        yield servers
